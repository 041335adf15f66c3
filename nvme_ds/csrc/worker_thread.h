#pragma once

#include <pthread.h>
#include <signal.h>

#include <thread>
#include <utility>

namespace nvme_ds {

// A thread that takes no signals: Ctrl-C belongs to the interpreter's main thread, not to one inside a system call of
// ours.
template <typename Body>
std::thread start_worker(const char* name, Body body) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        std::thread thread(std::move(body));
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        pthread_setname_np(thread.native_handle(), name);
        return thread;
    } catch (...) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw;
    }
}

}  // namespace nvme_ds
