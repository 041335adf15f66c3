// One io_uring instance through the raw system calls, for a single thread that submits and reaps.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/syscall.h>
#endif
#endif

// IORING_OP_READ and IORING_OP_WRITE came with this feature bit (Linux 5.6); headers older than that build without the
// backend.
#if defined(IORING_FEAT_RW_CUR_POS) && defined(__NR_io_uring_setup)
#define NDS_HAVE_URING 1
#else
#define NDS_HAVE_URING 0
#endif

#if NDS_HAVE_URING
namespace nvme_ds {

class Ring {
public:
    explicit Ring(unsigned entries);  // throws std::system_error
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    int fd() const { return fd_; }
    io_uring_sqe* next_sqe();     // nullptr when the submission ring is full
    unsigned unsubmitted() const { return to_submit_; }
    int submit();                 // 0 when the kernel took everything, else -errno; what it left stays queued
    void unqueue();               // forgets what is queued but not submitted
    bool next_cqe(uint64_t* user_data, int32_t* result);
    int wait_for_completion();
    bool supports(unsigned opcode) const;

private:
    void map_rings(const io_uring_params& params);
    void unmap_rings();

    int fd_ = -1;
    void* sq_map_ = nullptr;
    void* cq_map_ = nullptr;
    size_t sq_map_bytes_ = 0;
    size_t cq_map_bytes_ = 0;
    io_uring_sqe* sqes_ = nullptr;
    size_t sqes_bytes_ = 0;
    unsigned* sq_head_ = nullptr;
    unsigned* sq_tail_ = nullptr;
    unsigned* sq_array_ = nullptr;
    unsigned sq_mask_ = 0;
    unsigned sq_entries_ = 0;
    unsigned* cq_head_ = nullptr;
    unsigned* cq_tail_ = nullptr;
    unsigned cq_mask_ = 0;
    io_uring_cqe* cqes_ = nullptr;
    unsigned to_submit_ = 0;
};

}  // namespace nvme_ds
#endif
