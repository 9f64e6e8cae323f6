# Reads the #include lines of a header tree and fails on an edge that the architecture forbids.
#   cmake -DINCLUDE_DIR=include/knock -P tests/support/check_floors.cmake
# 1. A file includes only files of an earlier row of `floors`, or of its own row without a cycle.
# 2. cpu/ is included by cpu/ and knock.hpp alone; the trainer's side by itself alone.
# 3. Eigen belongs to cpu/; the trainer's libraries to the trainer's side.
cmake_minimum_required(VERSION 3.25)
cmake_path(ABSOLUTE_PATH INCLUDE_DIR)

set(floors  # one row each, lowest first: regular expressions on the path without .hpp
  "config|fwd"
  "core/error" "core/(dtype|device|shape|parallel|math)"
  "ops/pointwise_functors" "core/(storage|philox|backend|loop_nest)"
  "cpu/.*"
  "core/.*"
  "autograd/.*"
  "ops/.*"
  "nn/.*"
  "(optim|io|data)/.*"
  "models/.*"
  "knock"
  "train/.*"
  "interop/.*"
  "train")
set(trainer_side "^(data/.*|io/checkpoint|train/.*|interop/.*|train)$")
set(trainer_libraries "^(toml\\+\\+/|toml\\.hpp|pcre2\\.h|nlohmann/|zlib\\.h)")

set(errors "")
function(row_of out file)
  set(row 0)
  foreach(pattern IN LISTS floors)
    if(file MATCHES "^(${pattern})$")
      break()
    endif()
    math(EXPR row "${row} + 1")
  endforeach()
  set(${out} ${row} PARENT_SCOPE)
endfunction()

list(LENGTH floors no_row)
file(GLOB_RECURSE files RELATIVE ${INCLUDE_DIR} ${INCLUDE_DIR}/*.hpp)
if(NOT files)
  message(FATAL_ERROR "no headers in ${INCLUDE_DIR}")
endif()
foreach(path IN LISTS files)
  string(REGEX REPLACE "\\.hpp$" "" file ${path})
  row_of(row ${file})
  if(row EQUAL no_row)
    list(APPEND errors "${path}: stands on no floor: add it to tests/support/check_floors.cmake")
  endif()
  set(same_row_${file} "")
  file(STRINGS ${INCLUDE_DIR}/${path} lines REGEX "^[ \t]*#[ \t]*include")
  foreach(line IN LISTS lines)
    string(REGEX REPLACE ".*include[ \t]*[<\"]([^>\"]+)[>\"].*" "\\1" included "${line}")
    if(included MATCHES "^(Eigen|unsupported/Eigen)/" AND NOT file MATCHES "^cpu/")
      list(APPEND errors "${path} -> ${included}: Eigen is for cpu/ alone")
    elseif(included MATCHES "${trainer_libraries}" AND NOT file MATCHES "${trainer_side}")
      list(APPEND errors "${path} -> ${included}: a library of the trainer's side alone")
    elseif(line MATCHES "\"")
      list(APPEND errors "${path}: write #include <knock/...> rather than \"${included}\"")
    elseif(included MATCHES "^knock/(.*)\\.hpp$")
      set(target ${CMAKE_MATCH_1})
      row_of(target_row ${target})
      if(target_row GREATER row)
        list(APPEND errors "${path} -> ${included}: an upward edge")
      elseif(target_row EQUAL row)
        list(APPEND same_row_${file} ${target})
      endif()
      if(target MATCHES "^cpu/" AND NOT file MATCHES "^(cpu/.*|knock)$")
        list(APPEND errors "${path} -> ${included}: only cpu/ and knock.hpp include cpu/")
      elseif(target MATCHES "${trainer_side}" AND NOT file MATCHES "${trainer_side}")
        list(APPEND errors "${path} -> ${included}: the library does not see the trainer's side")
      endif()
    endif()
  endforeach()
endforeach()

# Cycles within a row: take away files whose neighbours are all gone; what cannot be taken away stands in a cycle, or above one.
string(REGEX REPLACE "\\.hpp(;|$)" "\\1" left "${files}")
set(changed TRUE)
while(changed)
  set(changed FALSE)
  foreach(file IN LISTS left)
    set(neighbours ${same_row_${file}})
    list(FILTER neighbours INCLUDE REGEX ".")
    set(blocked FALSE)
    foreach(neighbour IN LISTS neighbours)
      if(neighbour IN_LIST left)
        set(blocked TRUE)
      endif()
    endforeach()
    if(NOT blocked)
      list(REMOVE_ITEM left ${file})
      set(changed TRUE)
    endif()
  endforeach()
endwhile()
if(left)
  list(JOIN left ", " left)
  list(APPEND errors "these files include each other in a circle: ${left}")
endif()

if(errors)
  list(JOIN errors "\n  " text)
  message(FATAL_ERROR "floors:\n  ${text}")
endif()
