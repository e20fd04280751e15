// Programs that run kernels in the emulation under every schedule and compare what comes out, bit by bit.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <vector>

namespace ttt::tests {

// Device memory of exactly its size: AddressSanitizer sees what lies beyond.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes, int fill = 0xff)
      : bytes_(bytes), at_(new (std::align_val_t{16}) unsigned char[bytes]) {
    std::memset(at_, fill, bytes);
  }
  ~Buffer() { ::operator delete[](at_, std::align_val_t{16}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <class T = void>
  T* as() const { return reinterpret_cast<T*>(at_); }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_;
  unsigned char* at_;
};

// What a problem has computed, one after the other.
using Outputs = std::vector<unsigned char>;
inline void append(Outputs& outputs, const Buffer& buffer) {
  outputs.insert(outputs.end(), buffer.as<unsigned char>(), buffer.as<unsigned char>() + buffer.bytes());
}

// Runs it all once, with the same inputs every time. Empty, or why it failed.
std::string run_problem(Outputs& outputs);

}  // namespace ttt::tests
