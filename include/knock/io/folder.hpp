#pragma once
// Folders that are complete or absent: filled under a temporary name, flushed to the disk, then renamed. And folders
// that one process at a time writes into.

#include <functional>
#include <string>

namespace knock::io {

/// Calls `fill` with the path of an empty temporary folder beside `path`, then gives it the name `path`; a folder that
/// had the name changes places with it and is removed after that. When `fill` throws or the disk is full, the temporary
/// folder is removed, what stood at `path` is untouched, and the error is passed on.
void write_folder(const std::string& path, const std::function<void(const std::string& temporary)>& fill);

/// Keeps other holders of the same folder's lock out, in this process and others, until it is destroyed or the process
/// ends, however it ends. Makes the folder when there is none; writes nothing into it. An error when somebody holds the
/// lock or the folder cannot be made; a file system without locks locks nothing.
class FolderLock {
 public:
  explicit FolderLock(const std::string& path);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int descriptor_;
};

}  // namespace knock::io

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_IO_FOLDER)
#include <knock/core/error.hpp>
#include <knock/io/file.hpp>

#include <cerrno>
#include <cstdio>
#include <filesystem>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

namespace knock::io {
namespace detail {

/// Flushes a file or folder to the disk.
inline void flush(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const bool flushed = descriptor >= 0 && ::fsync(descriptor) == 0;
  const int error = errno;
  if (descriptor >= 0) ::close(descriptor);
  check(flushed, "write_folder", path, ": ", system_message(error));
}

/// Renames; a folder that has the name already is at `temporary` afterwards, in one step where the file system can.
inline void put_in_place(const std::filesystem::path& temporary, const std::filesystem::path& target) {
  const auto rename = [](const std::filesystem::path& from, const std::filesystem::path& to, unsigned flags) {
    return ::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), flags) == 0;
  };
  bool done = rename(temporary, target, RENAME_NOREPLACE) || rename(temporary, target, RENAME_EXCHANGE);
  if (!done && errno == EINVAL) {  // a file system that knows neither
    const std::filesystem::path replaced = temporary.string() + "-replaced";
    done = !std::filesystem::exists(target) || std::rename(target.c_str(), replaced.c_str()) == 0;
    done = done && std::rename(temporary.c_str(), target.c_str()) == 0;
    if (done) std::rename(replaced.c_str(), temporary.c_str());
  }
  check(done, "write_folder", target.string(), ": ", system_message(errno));
}

}  // namespace detail

KNOCK_FUNC void write_folder(const std::string& path, const std::function<void(const std::string& temporary)>& fill) {
  namespace fs = std::filesystem;
  const fs::path target = fs::absolute(path).lexically_normal();
  const fs::path temporary = target.parent_path() / text(".", target.filename().string(), ".tmp-", ::getpid());
  std::error_code error;
  fs::remove_all(temporary, error);
  fs::create_directories(temporary, error);
  check(!error, "write_folder", temporary.string(), ": ", error.message());
  try {
    fill(temporary.string());
    for (const auto& entry : fs::directory_iterator(temporary)) detail::flush(entry.path().string());
    detail::flush(temporary.string());
    detail::put_in_place(temporary, target);
    detail::flush(target.parent_path().string());
    fs::remove_all(temporary, error);
  } catch (...) {
    fs::remove_all(temporary, error);
    throw;
  }
}

KNOCK_FUNC FolderLock::FolderLock(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  check(!error, "lock", "cannot make the folder ", path, ": ", error.message());
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  check(descriptor_ >= 0, "lock", path, ": ", system_message(errno));
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return;
  ::close(descriptor_);
  fail("lock", "another process is writing into ", path);
}

KNOCK_FUNC FolderLock::~FolderLock() { ::close(descriptor_); }

}  // namespace knock::io
#endif
