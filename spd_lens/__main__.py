from spd_lens.cli import main

main()
