// Rows of a float matrix in a file, read when they are needed: an embedding of which a prompt touches little.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops.h"

namespace qhub {

class Embedding {
 public:
  // Rows of `size` numbers of `type` from byte `offset` of the file on.
  Embedding(const std::string& path, size_t offset, Float type, size_t rows, size_t size);
  ~Embedding();
  Embedding(const Embedding&) = delete;
  Embedding& operator=(const Embedding&) = delete;

  size_t rows() const { return rows_; }
  size_t size() const { return size_; }
  // Row n times `factor`, float32. Throws std::runtime_error when the file ends early.
  void copy_row(const Ops& ops, size_t n, float factor, float* to);

 private:
  int file_;
  size_t offset_;
  Float type_;
  size_t rows_, size_;
  std::vector<uint8_t> row_;
};

}  // namespace qhub
