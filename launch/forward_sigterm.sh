[ $$ = 1 ] && who=-1 || who=0
trap 'trap "" TERM; kill -TERM $who' TERM
(trap "" TERM; exec "$@") &
wait $!
wait $!
