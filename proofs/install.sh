#!/usr/bin/env bash
# What Coq needs: installed by apt when that is possible, named otherwise.
set -euo pipefail
packages=(coq libcoq-mathcomp-algebra libcoq-coquelicot libcoq-mathcomp-analysis)

have_coq() {
    command -v coqc >/dev/null || return 1
    local libraries
    libraries="$(coqc -where)/user-contrib"
    [[ -d $libraries/mathcomp/algebra && -d $libraries/Coquelicot &&
        -d $libraries/mathcomp/analysis ]]
}

if have_coq; then
    exit 0
elif [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
    echo "installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
    have_coq
else
    echo "The proofs need Coq and three libraries. On Debian or Ubuntu, as root:"
    echo "    apt-get install --no-install-recommends ${packages[*]}"
    echo "Elsewhere, for example by opam: coq 8.16.1, coq-mathcomp-algebra 1.15.0,"
    echo "coq-coquelicot 3.2.0, coq-mathcomp-analysis 0.6.0."
    exit 1
fi >&2
