#pragma once

/// Arrays in NumPy's .npy format, version 1.0: little-endian, C order.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dkm {

struct Array {
  /// As NumPy writes it: "<f4", "<i8", "|b1"...
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::vector<unsigned char> bytes;
};

/// Bytes of an element of a dtype that is read and written here, or 0 for another one.
std::size_t item_size(const std::string& dtype);

/// "float32[2, 3]", for messages; a dtype without a name here is left as it is.
std::string describe(const std::string& dtype, const std::vector<std::int64_t>& shape);

/// Throws std::runtime_error if there is no such file, or if it is not exactly an array of these.
Array read_npy(const std::string& path);

/// Throws std::runtime_error if the file cannot be written. `data` has the bytes of the shape.
void write_npy(const std::string& path, const std::string& dtype,
               const std::vector<std::int64_t>& shape, const void* data, std::size_t size);

}  // namespace dkm
