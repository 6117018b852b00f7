# Sourced by the scripts beside it, which set `dry` to show commands instead of running them.

# Shows a command, and runs it unless it is a dry run.
run() {
    local word
    printf '+'
    for word in "$@"; do
        case $word in
        "" | *[!A-Za-z0-9_./:=,@+-]*) printf ' %s' "${word@Q}" ;;
        *) printf ' %s' "$word" ;;
        esac
    done
    echo
    [ -n "${dry:-}" ] || "$@"
}

# `wait` that a trapped signal does not end: the trap sets `signalled`, and what was started is still saving then.
wait_for() {
    local code
    while :; do
        signalled=""
        code=0
        wait "$@" || code=$?
        # A code above 128 may be that of the signal; below, of what was waited for, just as the signal came.
        if [ -z "$signalled" ] || [ "$code" -le 128 ]; then return "$code"; fi
    done
}

# The comment at the top of the script: how it is used.
usage() {
    sed -nE '2,/^([^#]|$)/{s/^# ?//p}' "$0" >&2
    exit 2
}
