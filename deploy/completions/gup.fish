# Completion of gup's commands and flags in fish; gup itself knows them.
function __gup_complete
    env _GUP_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=$argv[1] _TYPER_COMPLETE_ARGS=(commandline -cp) gup 2>/dev/null
end
complete --command gup --no-files --condition '__gup_complete is-args' --arguments '(__gup_complete get-args)'
