from ft_assets.cli import main

main()
