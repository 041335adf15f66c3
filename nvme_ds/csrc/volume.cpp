#include "volume.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace nvme_ds {

Volume::Volume(std::vector<VolumeFile> files, Layout layout, uint64_t num_bytes, Direct direct)
    : files_(std::move(files)),
      layout_(std::move(layout)),
      num_bytes_(num_bytes),
      must_be_direct_(direct == Direct::kYes),
      direct_(direct != Direct::kNo) {}

bool Volume::leave_direct(bool& first) {
    if (must_be_direct_) return false;
    first = direct_.exchange(false);
    for (const VolumeFile& file : files_) {
        const int flags = ::fcntl(file.fd, F_GETFL);
        if (flags >= 0 && flags & O_DIRECT) ::fcntl(file.fd, F_SETFL, flags & ~O_DIRECT);
    }
    return true;
}

Volume::~Volume() {
    for (const VolumeFile& file : files_) ::close(file.fd);
}

void fill_failure(nds_failure& failure, int error, int op, uint64_t offset, uint64_t num_bytes,
                  const std::string& path) {
    failure.error = error;
    failure.op = op;
    failure.offset = offset;
    failure.num_bytes = num_bytes;
    const size_t length = std::min(path.size(), sizeof(failure.path) - 1);
    std::memcpy(failure.path, path.data(), length);
    failure.path[length] = '\0';
}

}  // namespace nvme_ds
