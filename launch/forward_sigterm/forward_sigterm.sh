[ $$ = 1 ] && who=-1 || who=0
trap 'trap "" TERM; while kill -0 $child; do kill -TERM $who; sleep 1; done 2>/dev/null' TERM
(trap "" TERM; exec "$@") &
child=$!
wait $child
wait $child
