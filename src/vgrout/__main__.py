from vgrout.cli import main

main()
