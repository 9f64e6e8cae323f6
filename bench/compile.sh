#!/usr/bin/env bash
# Seconds of processor time to compile a file that includes the library (median of 3), g++ and clang++ at -O2.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
echo '#include <knock/core/tensor.hpp>
int main() {}' >"$dir/tensor.cpp"
echo '#include <knock/knock.hpp>
int main() {}' >"$dir/knock.cpp"

seconds() {  # COMPILER FLAG... FILE: the compiler's processor time, which other work on the machine changes little
  local TIMEFORMAT='%U %S' taken=()
  while ((${#taken[@]} < 3)) && [[ ${taken[0]:-0} != [1-9][0-9]* ]]; do  # one run says enough from ten seconds on
    rm -f "$dir/out.o"
    taken+=("$({ time "$@" -std=c++20 -O2 -fopenmp -I "$root/include" -c -o "$dir/out.o" 2>"$dir/errors"; } 2>&1 |
      awk '{printf "%.2f", $1 + $2}')")
    [[ -f $dir/out.o ]] || { cat "$dir/errors" >&2; return 1; }
  done
  printf '%s\n' "${taken[@]}" | sort -n | sed -n "$(((${#taken[@]} + 1) / 2))p"
}

row() {  # TEXT TARGET FLAG... FILE
  local text=$1 target=$2 gcc clang
  shift 2
  gcc=$(seconds g++ "$@")
  clang=$(seconds clang++ "$@")
  printf '%-46s %8s %8s   %s\n' "$text" "$gcc" "$clang" "$target"
}

printf '%-46s %8s %8s   %s\n' 'seconds to compile' 'g++' 'clang++' 'target'
row 'core/tensor.hpp, empty main' '<= 1' "$dir/tensor.cpp"
row 'knock.hpp compiled (-DKNOCK_COMPILED), empty main' '' -DKNOCK_COMPILED "$dir/knock.cpp"
row 'knock.hpp header-only, empty main' '<= 6' "$dir/knock.cpp"
row 'knock.hpp header-only, a small program' '<= 6' "$root/tests/package/main.cpp"
