# Bash runs this before a script: process 1 restarts under forward_sigterm.sh, see launch/tuner.py.
if [ $$ = 1 ] && [ -f "$0" ] && [ -z "$FORWARDING_SIGTERM" ]; then
    FORWARDING_SIGTERM=1 exec bash "${BASH_ENV%/*}/forward_sigterm.sh" bash "$0" "$@"
fi
