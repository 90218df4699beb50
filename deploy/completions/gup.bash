# Completion of gup's commands, flags and files in bash; gup itself knows them.
_gup() {
    local IFS=$'\n'
    COMPREPLY=( $(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD="$COMP_CWORD" _GUP_COMPLETE=complete_bash "$1" 2>/dev/null) )
}
complete -o default -F _gup gup
