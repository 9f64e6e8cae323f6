#pragma once
// Whole files in and out, with errors that name the file and the system's reason. A written file is complete or absent:
// the bytes go to a temporary name beside it, are flushed to the disk, and take the final name by rename(2).

#include <knock/core/error.hpp>

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

namespace knock::io {

/// The bytes of a regular file. Throws when it is missing, unreadable, not a regular file, or larger than `max_bytes`.
std::string read_file(const std::string& path, int64_t max_bytes = std::numeric_limits<int64_t>::max());

/// Writes `bytes` to `path` atomically; on any failure (full disk, no permission) the old file is untouched.
void write_file(const std::string& path, std::string_view bytes);

}  // namespace knock::io

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_IO_FILE)

#include <cerrno>
#include <system_error>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace knock::io {
namespace detail {

/// The system's words for an error number, such as "No such file or directory".
inline std::string system_message(int error) { return std::generic_category().message(error); }

/// An open file, closed with its scope.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  int close() {
    const int fd = fd_;
    fd_ = -1;
    return ::close(fd);
  }

 private:
  int fd_;
};

/// `read(2)` until the end of the file; appends to `out`, never more than `max_bytes` in all.
inline void read_all(int fd, const std::string& path, int64_t max_bytes, std::string& out) {
  constexpr std::size_t chunk = std::size_t{1} << 20;
  std::size_t used = out.size();
  for (;;) {
    if (out.size() - used < chunk) out.resize(used + chunk);
    const ssize_t got = ::read(fd, out.data() + used, out.size() - used);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail("read_file", "cannot read ", path, ": ", system_message(errno));
    if (got == 0) break;
    used += static_cast<std::size_t>(got);
    check(static_cast<int64_t>(used) <= max_bytes, "read_file", path, " is larger than ", max_bytes, " bytes");
  }
  out.resize(used);
}

}  // namespace detail

KNOCK_FUNC std::string read_file(const std::string& path, int64_t max_bytes) {
  // O_NONBLOCK: opening a named pipe must give the error below, not wait for a writer.
  const detail::Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) fail("read_file", "cannot open ", path, ": ", detail::system_message(errno));
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) fail("read_file", "cannot read ", path, ": ", detail::system_message(errno));
  check(S_ISREG(info.st_mode), "read_file", path, " is not a regular file");
  check(info.st_size <= max_bytes, "read_file", path, " is larger than ", max_bytes, " bytes");
  std::string bytes;
  bytes.reserve(static_cast<std::size_t>(info.st_size) + 1);
  detail::read_all(file.get(), path, max_bytes, bytes);
  return bytes;
}

KNOCK_FUNC void write_file(const std::string& path, std::string_view bytes) {
  const std::string temporary = text(path, ".tmp", static_cast<int64_t>(::getpid()));
  const auto give_up = [&](int error) {
    ::unlink(temporary.c_str());
    fail("write_file", "cannot write ", path, ": ", detail::system_message(error));
  };
  detail::Descriptor file(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (file.get() < 0) give_up(errno);
  for (std::size_t done = 0; done < bytes.size();) {
    const ssize_t written = ::write(file.get(), bytes.data() + done, bytes.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) give_up(errno);
    done += static_cast<std::size_t>(written);
  }
  if (::fsync(file.get()) != 0) give_up(errno);
  if (file.close() != 0) give_up(errno);
  if (::rename(temporary.c_str(), path.c_str()) != 0) give_up(errno);
}

}  // namespace knock::io

#endif
