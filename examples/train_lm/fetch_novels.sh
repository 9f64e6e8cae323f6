#!/bin/sh
# Fetches six novels by Jane Austen (public domain) from the Debian package r-cran-janeaustenr, through apt, without
# root and without installing it.
#
#   fetch_novels.sh [FOLDER [EXTRACTOR]]
#
# FOLDER (default build/data/novels) gets train/*.txt, five novels, valid/persuasion.txt, the one held out, and
# SHA256SUMS. It appears complete or not at all; a complete one is only checked. EXTRACTOR is the built program
# extract_novels (default: that of the release build; compiled on the spot where there is none).
set -eu
export LC_ALL=C

die() { echo "fetch_novels: $1" >&2; exit 1; }
package=r-cran-janeaustenr
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-$root/build/data/novels}
extractor=${2:-$root/build/release/examples/extract_novels}
# SHA-256 of SHA256SUMS for the text that the published bits per byte were measured on.
known=5bfb9054e328fa059c22f56ed658e16e58c03f8ce043582c393788de485d6218

complete() { (cd "$folder" && sha256sum --check --strict --status SHA256SUMS) 2>/dev/null; }

report() {
  (cd "$folder" && wc -c train/*.txt valid/*.txt)
  sum=$(sha256sum <"$folder/SHA256SUMS" | cut -d ' ' -f 1)
  echo "sha256 $sum (of SHA256SUMS)"
  [ "$sum" = "$known" ] || echo "note: another edition than the one the published figures were measured on"
  exit 0
}

complete && report
if [ -e "$folder" ] && [ ! -e "$folder/SHA256SUMS" ] && [ -n "$(ls -A "$folder" 2>/dev/null)" ]; then
  die "$folder exists and holds something else: name another folder"
fi
for program in apt-get dpkg-deb; do
  command -v $program >/dev/null ||
    die "$program is missing: the novels come from a Debian package; train on your own text with --data.path=FOLDER"
done

parent=$(dirname "$folder")
mkdir -p "$parent" 2>/dev/null || die "cannot make the folder $parent"
tmp=$(mktemp -d "$parent/.novels.XXXXXX" 2>/dev/null) || die "cannot write in $parent: no permission, or the disk is full"
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# step TEXT COMMAND...: fails with the text and the reason among the command's words, which are kept in memory: the disk
# may be full.
step() {
  text=$1
  shift
  words=$("$@" 2>&1) && return 0
  for pattern in 'Failed to fetch' '^E:' '[Nn]o space left' .; do
    reason=$(echo "$words" | grep "$pattern" | tail -n 1 | sed 's/^[EW]: *//' | cut -c 1-200) || true
    [ -z "$reason" ] || break
  done
  die "$text: ${reason:-no reason given}"
}

apt() {
  (cd "$tmp" && apt-get -q -o APT::Sandbox::User=root -o Acquire::Retries=2 -o Acquire::http::Timeout=20 "$@")
}

if ! apt download $package >/dev/null 2>&1; then  # the system's package lists are missing or old: fetch our own
  mkdir -p "$tmp/lists/partial" "$tmp/cache/archives/partial"
  step "cannot read Debian's package lists" apt -o Dir::State::lists="$tmp/lists" -o Dir::Cache="$tmp/cache" \
    -o APT::Update::Error-Mode=any update
  step "cannot download $package" apt -o Dir::State::lists="$tmp/lists" -o Dir::Cache="$tmp/cache" download $package
fi
step "cannot unpack $package" dpkg-deb -x "$tmp"/${package}_*.deb "$tmp/package"
if [ ! -x "$extractor" ]; then
  extractor=$tmp/extract_novels
  step "cannot compile extract_novels" "${CXX:-c++}" -std=c++20 -O1 -I "$root/include" \
    "$root/examples/extract_novels/extract_novels.cpp" -lz -o "$extractor"
fi
step "cannot extract the novels" "$extractor" \
  "$tmp/package/usr/lib/R/site-library/janeaustenr/data/Rdata" "$tmp/novels"
(cd "$tmp/novels" && sha256sum train/*.txt valid/*.txt >SHA256SUMS) 2>/dev/null || die "cannot write in $tmp: disk full?"

[ ! -e "$folder" ] || mv -T "$folder" "$tmp/old" || die "cannot replace $folder"
mv -T "$tmp/novels" "$folder" 2>/dev/null || complete || die "cannot make $folder"
report
