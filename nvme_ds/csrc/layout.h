// Where the bytes of a volume lie: stripes dealt to the files in a repeating pattern.
#pragma once

#include <cstdint>
#include <vector>

namespace nvme_ds {

struct Extent {
    uint32_t file;
    uint64_t file_offset;
    uint64_t num_bytes;
};

class Layout {
public:
    Layout(std::vector<uint32_t> pattern, uint32_t num_files, uint64_t stripe_bytes);

    // The longest run from `offset` that is contiguous in one file, at most `limit` bytes.
    Extent extent_at(uint64_t offset, uint64_t limit) const;

private:
    std::vector<uint32_t> pattern_;
    std::vector<uint64_t> rank_;       // how many earlier stripes of the cycle lie in the same file
    std::vector<uint64_t> per_cycle_;  // stripes of each file in one cycle
    uint64_t stripe_bytes_;
};

}  // namespace nvme_ds
