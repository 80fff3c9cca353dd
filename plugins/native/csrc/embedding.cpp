#include "embedding.h"

#include <fcntl.h>
#include <unistd.h>

#include <stdexcept>

namespace qhub {

// Read, not mapped: a fault in a mapped file brings in 64 KB for a row of 4.
Embedding::Embedding(const std::string& path, size_t offset, Float type, size_t rows, size_t size)
    : file_(open(path.c_str(), O_RDONLY | O_CLOEXEC)), offset_(offset), type_(type), rows_(rows), size_(size), row_(size * float_bytes(type)) {
  if (file_ < 0) throw std::runtime_error("cannot open " + path);
}

Embedding::~Embedding() { close(file_); }

void Embedding::copy_row(const Ops& ops, size_t n, float factor, float* to) {
  size_t done = 0;
  while (done < row_.size()) {
    const ssize_t count = pread(file_, row_.data() + done, row_.size() - done, static_cast<off_t>(offset_ + n * row_.size() + done));
    if (count <= 0) throw std::runtime_error("the model's file ends before its embedding does");
    done += static_cast<size_t>(count);
  }
  ops.to_float(type_, row_.data(), size_, to);
  if (factor == 1) return;
  for (size_t i = 0; i < size_; ++i) to[i] *= factor;
}

}  // namespace qhub
