#!/usr/bin/env bash
# seconds of processor time to compile a file that includes the library (median of 3), g++ and clang++ at -O2.
#
#   ./run bench compile [--json]
set -euo pipefail
json=0
for word in "$@"; do
  case $word in
    --json) json=1 ;;
    --help) echo "usage: compile [--json]"; exit 0 ;;
    *) echo "compile: unknown option $word; --help lists them" >&2; exit 2 ;;
  esac
done
root=$(cd "$(dirname "$0")/.." && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
echo '#include <knock/core/tensor.hpp>
int main() {}' >"$dir/tensor.cpp"
echo '#include <knock/knock.hpp>
int main() {}' >"$dir/knock.cpp"
machine=$(sed -n '/^model name/{s/[^:]*: //p;q}' /proc/cpuinfo)

seconds() {  # COMPILER FLAG... FILE: the compiler's processor time, which other work on the machine changes little; sorted
  local TIMEFORMAT='%U %S' taken=()
  while ((${#taken[@]} < 3)) && [[ ${taken[0]:-0} != [1-9][0-9]* ]]; do  # one run says enough from ten seconds on
    rm -f "$dir/out.o"
    taken+=("$({ time "$@" -std=c++20 -O2 -fopenmp -I "$root/include" -c -o "$dir/out.o" 2>"$dir/errors"; } 2>&1 |
      awk '{printf "%.2f", $1 + $2}')")
    [[ -f $dir/out.o ]] || { cat "$dir/errors" >&2; return 1; }
  done
  printf '%s\n' "${taken[@]}" | sort -n | tr '\n' ' '
}

row() {  # TEXT TARGET FLAG... FILE
  local text=$1 target=$2 compiler sorted taken medians=()
  shift 2
  for compiler in g++ clang++; do
    sorted=$(seconds "$compiler" "$@")
    read -ra taken <<<"$sorted"
    medians+=("${taken[${#taken[@]} / 2]}")
    ((json)) || continue
    printf '{"bench":"compile","machine":"%s","isa":"any","threads":1,"what":"%s","compiler":"%s","target":"%s",' \
      "$machine" "$text" "$compiler" "$target"
    printf '"compile_s":%s,"compile_s_min":%s,"compile_s_max":%s}\n' "${medians[-1]}" "${taken[0]}" "${taken[-1]}"
  done
  ((json)) || printf '%-46s %8s %8s   %s\n' "$text" "${medians[@]}" "$target"
}

((json)) || printf 'compile: %s\n\n%-46s %8s %8s   %s\n' "$machine" 'seconds to compile' 'g++' 'clang++' 'target'
row 'core/tensor.hpp, empty main' '<= 1' "$dir/tensor.cpp"
row 'knock.hpp compiled (-DKNOCK_COMPILED), empty main' '' -DKNOCK_COMPILED "$dir/knock.cpp"
row 'knock.hpp header-only, empty main' '<= 6' "$dir/knock.cpp"
row 'knock.hpp header-only, a small program' '<= 6' "$root/tests/package/main.cpp"
