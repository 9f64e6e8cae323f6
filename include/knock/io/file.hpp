#pragma once
// Whole files in and out, with errors that name the file and the system's reason. A written file is complete or absent:
// the bytes go to a temporary name beside it, are flushed to the disk, and take the final name by rename(2).

#include <knock/core/error.hpp>

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

namespace knock::io {

/// A file under construction: complete under its name after `commit`, absent without.
class AtomicFile {
 public:
  /// Opens a temporary file beside `path`. Errors name the operation `op`.
  AtomicFile(std::string_view op, const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, int64_t bytes);
  /// Flushes to the disk and gives the file its name.
  void commit();

 private:
  [[noreturn]] void give_up(int error);

  std::string op_, path_, temporary_;
  int fd_ = -1;
};

/// A regular file mapped into memory for reading.
class MappedFile {
 public:
  /// Errors name the operation `op`.
  MappedFile(std::string_view op, const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::string_view bytes() const { return {data_, size_}; }

 private:
  const char* data_ = nullptr;
  std::size_t size_ = 0;
};

/// The bytes of a regular file. Throws when it is missing, unreadable, not a regular file, or larger than `max_bytes`.
std::string read_file(const std::string& path, int64_t max_bytes = std::numeric_limits<int64_t>::max());

/// Writes `bytes` to `path` atomically; on any failure (full disk, no permission) the old file is untouched.
void write_file(const std::string& path, std::string_view bytes);

/// The system's words for an error number (errno), such as "No such file or directory".
std::string system_message(int error);

}  // namespace knock::io

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_IO_FILE)

#include <atomic>
#include <cerrno>
#include <system_error>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace knock::io {

KNOCK_FUNC std::string system_message(int error) { return std::generic_category().message(error); }

namespace detail {

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
  if (file.get() < 0) fail("read_file", "cannot open ", path, ": ", system_message(errno));
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) fail("read_file", "cannot read ", path, ": ", system_message(errno));
  check(S_ISREG(info.st_mode), "read_file", path, " is not a regular file");
  check(info.st_size <= max_bytes, "read_file", path, " is larger than ", max_bytes, " bytes");
  std::string bytes;
  bytes.reserve(static_cast<std::size_t>(info.st_size) + 1);
  detail::read_all(file.get(), path, max_bytes, bytes);
  return bytes;
}

KNOCK_FUNC AtomicFile::AtomicFile(std::string_view op, const std::string& path) : op_(op), path_(path) {
  static std::atomic<int64_t> counter{0};  // threads may write at the same time
  temporary_ = text(path, ".tmp", static_cast<int64_t>(::getpid()), "-", ++counter);
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) fail(op_, "cannot write ", path_, ": ", system_message(errno));
}

KNOCK_FUNC AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

KNOCK_FUNC void AtomicFile::give_up(int error) { fail(op_, "cannot write ", path_, ": ", system_message(error)); }

KNOCK_FUNC void AtomicFile::write(const void* data, int64_t bytes) {
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(fd_, next, static_cast<std::size_t>(std::min<int64_t>(bytes, 1 << 30)));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) give_up(errno);
    next += written;
    bytes -= written;
  }
}

KNOCK_FUNC void AtomicFile::commit() {
  if (::fsync(fd_) != 0) give_up(errno);
  const int fd = fd_;
  fd_ = -1;
  if (::close(fd) != 0) give_up(errno);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) give_up(errno);
  temporary_.clear();
  const std::size_t slash = path_.rfind('/');  // the new name must survive a power failure too
  const std::string folder = slash == std::string::npos ? "." : path_.substr(0, slash + 1);
  const detail::Descriptor directory(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory.get() >= 0) ::fsync(directory.get());
}

KNOCK_FUNC void write_file(const std::string& path, std::string_view bytes) {
  AtomicFile file("write_file", path);
  file.write(bytes.data(), static_cast<int64_t>(bytes.size()));
  file.commit();
}

KNOCK_FUNC MappedFile::MappedFile(std::string_view op, const std::string& path) {
  const detail::Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) fail(op, "cannot open ", path, ": ", system_message(errno));
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) fail(op, "cannot read ", path, ": ", system_message(errno));
  check(S_ISREG(info.st_mode), op, path, " is not a regular file");
  if (info.st_size == 0) return;
  void* mapped = ::mmap(nullptr, static_cast<std::size_t>(info.st_size), PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (mapped == MAP_FAILED) fail(op, "cannot read ", path, ": ", system_message(errno));
  data_ = static_cast<const char*>(mapped);
  size_ = static_cast<std::size_t>(info.st_size);
}

KNOCK_FUNC MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<char*>(data_), size_);
}

}  // namespace knock::io

#endif
