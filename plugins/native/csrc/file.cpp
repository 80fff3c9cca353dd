#include "file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace qhub {
namespace {

constexpr size_t kPiece = size_t{4} << 20;

bool read_piece(int file, uint8_t* to, size_t offset, size_t count) {
  for (size_t done = 0; done < count;) {
    const ssize_t got = pread(file, to + done, count - done, static_cast<off_t>(offset + done));
    if (got <= 0) return false;
    done += static_cast<size_t>(got);
  }
  return true;
}

}  // namespace

Memory read_file(Pool& pool, const std::string& path, size_t offset, size_t count) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw std::runtime_error("cannot open " + path);
  Memory memory(count);
  std::atomic<bool> whole{true};
  pool.run((count + kPiece - 1) / kPiece, [&](size_t piece, int) {
    const size_t begin = piece * kPiece;
    if (!read_piece(file, memory.data() + begin, offset + begin, std::min(kPiece, count - begin))) whole = false;
  });
  close(file);
  if (!whole) throw std::runtime_error(path + " ends early");
  return memory;
}

}  // namespace qhub
