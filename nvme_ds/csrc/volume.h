// The open files of a volume. Tickets in flight share ownership, so the descriptors outlive close() until the kernel is
// done.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "abi.h"
#include "layout.h"

namespace nvme_ds {

class Device;

struct VolumeFile {
    int fd;
    std::string path;
    Device* device;
};

class Volume {
public:
    enum class Direct { kNo, kIfPossible, kYes };

    Volume(std::vector<VolumeFile> files, Layout layout, uint64_t num_bytes, Direct direct);
    ~Volume();
    Volume(const Volume&) = delete;
    Volume& operator=(const Volume&) = delete;

    const std::vector<VolumeFile>& files() const { return files_; }
    const Layout& layout() const { return layout_; }
    uint64_t num_bytes() const { return num_bytes_; }
    bool direct() const { return direct_.load(std::memory_order_relaxed); }

    // Go on through the page cache, if that is allowed. `first`: whether it was this call that began to.
    bool leave_direct(bool& first);

private:
    std::vector<VolumeFile> files_;
    Layout layout_;
    uint64_t num_bytes_;
    bool must_be_direct_;
    std::atomic<bool> direct_;
};

void fill_failure(nds_failure& failure, int error, int op, uint64_t offset, uint64_t num_bytes,
                  const std::string& path);

}  // namespace nvme_ds
