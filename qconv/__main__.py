from qconv.cli import main

main()
