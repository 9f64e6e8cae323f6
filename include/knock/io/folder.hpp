#pragma once
// Folders that are complete or absent: filled under a temporary name, flushed to the disk, then renamed.

#include <functional>
#include <string>

namespace knock::io {

/// Calls `fill` with the path of an empty temporary folder beside `path`, then gives it the name `path`; a folder that
/// had the name is removed after that. When `fill` throws or the disk is full, the temporary folder is removed, what
/// stood at `path` is untouched, and the error is passed on.
void write_folder(const std::string& path, const std::function<void(const std::string& temporary)>& fill);

}  // namespace knock::io

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_IO_FOLDER)
#include <knock/core/error.hpp>
#include <knock/io/file.hpp>

#include <cerrno>
#include <filesystem>

#include <fcntl.h>
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

}  // namespace detail

KNOCK_FUNC void write_folder(const std::string& path, const std::function<void(const std::string& temporary)>& fill) {
  namespace fs = std::filesystem;
  const fs::path target = fs::absolute(path).lexically_normal();
  const auto hidden = [&](const char* what) {
    return target.parent_path() / text(".", target.filename().string(), what, ::getpid());
  };
  const fs::path temporary = hidden(".tmp-"), replaced = hidden(".old-");
  std::error_code error;
  fs::remove_all(temporary, error);
  fs::create_directories(temporary, error);
  check(!error, "write_folder", temporary.string(), ": ", error.message());
  try {
    fill(temporary.string());
    for (const auto& entry : fs::directory_iterator(temporary)) detail::flush(entry.path().string());
    detail::flush(temporary.string());
    if (fs::exists(target)) fs::rename(target, replaced);
    fs::rename(temporary, target, error);
    check(!error, "write_folder", path, ": ", error.message());
    detail::flush(target.parent_path().string());
    fs::remove_all(replaced, error);
  } catch (...) {
    fs::remove_all(temporary, error);
    throw;
  }
}

}  // namespace knock::io
#endif
