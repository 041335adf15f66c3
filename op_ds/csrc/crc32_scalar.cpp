// Eight bytes at a time through eight tables: the reference of the folding paths, and what finishes their last bytes.
#include <array>

#include "crc32.h"

namespace op_ds {
namespace {

constexpr int kSlices = 8;
using Tables = std::array<std::array<uint32_t, 256>, kSlices>;

// tables[k][b]: the state after byte b and k zero bytes.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t state = byte;
    for (int bit = 0; bit < 8; ++bit) state = (state >> 1) ^ (state & 1 ? kCrcPolynomial : 0);
    tables[0][byte] = state;
  }
  for (int slice = 1; slice < kSlices; ++slice) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[slice - 1][byte];
      tables[slice][byte] = (before >> 8) ^ tables[0][before & 0xff];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint32_t little_endian(const uint8_t* p) noexcept {
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
         static_cast<uint32_t>(p[3]) << 24;
}

}  // namespace

uint32_t crc32_scalar(uint32_t state, const uint8_t* data, int64_t num_bytes) noexcept {
  for (; num_bytes >= kSlices; data += kSlices, num_bytes -= kSlices) {
    const uint32_t first = state ^ little_endian(data), second = little_endian(data + 4);
    state = 0;
    for (int i = 0; i < 4; ++i) {
      state ^= kTables[7 - i][(first >> (8 * i)) & 0xff] ^ kTables[3 - i][(second >> (8 * i)) & 0xff];
    }
  }
  for (; num_bytes > 0; ++data, --num_bytes) state = (state >> 8) ^ kTables[0][(state ^ *data) & 0xff];
  return state;
}

}  // namespace op_ds
