"""`python -m ft_handler`: the `ft-handler` command."""

from ft_handler.cli.main import main

if __name__ == "__main__":
    main()
