#!/bin/sh
# Every command that arrives passes here and is counted. Where the machine has a file "fault", each command that meets none
# yet meets the fault which that file names, once; commands that differ in an enclave's id alone are the same. With words
# behind the fault only commands with these words meet it.
# shellcheck source=/dev/null # written by the test
. "${0%/*}/environment"
number=$(($(cat "$MACHINE/steps" 2>/dev/null || echo 0) + 1))
echo "$number" >"$MACHINE/steps"
printf '%s\n' "$SSH_ORIGINAL_COMMAND" >"$MACHINE/step.$number"

run() { sh -c "$SSH_ORIGINAL_COMMAND"; }

# Ends the process that holds this connection, and no other one.
cut() {
  process=$$
  while [ "$(cat "/proc/$process/comm")" != sshd ]; do
    process=$(awk '{ print $4 }' "/proc/$process/stat")
  done
  kill -9 "$process"
}

kind=none words=
[ ! -e "$MACHINE/fault" ] || read -r fault words <"$MACHINE/fault"
if [ -n "${fault:-}" ] && printf '%s' "$SSH_ORIGINAL_COMMAND" | grep -qF -- "$words"; then
  command=$(printf '%s' "$SSH_ORIGINAL_COMMAND" | sed 's/-enc[0-9a-f]*//g' | sha256sum)
  if ! grep -qsF "$command" "$MACHINE/faulted"; then
    echo "$command" >>"$MACHINE/faulted"
    kind=$fault
  fi
fi
case $kind in
  none) run ;;
  # What was asked for is done, and nobody hears of it.
  cut) run >/dev/null 2>&1 </dev/null; cut ;;
  # What was asked for is not done in time.
  late) exit 124 ;;
  hangs) exec tail -f /dev/null ;;
  # Tells the test, which ends the program; what it asked for is done all the same.
  held)
    echo held >"$MACHINE/held"
    run >/dev/null 2>&1 </dev/null
    echo ended >"$MACHINE/held"
    ;;
esac
