from examples import quickstart


def test_quickstart_learns_and_prints_its_table(capsys):
    losses = quickstart.main()
    assert losses[-1] < 0.1 * losses[0]
    assert "APOLLO rank 16, 256 contracted" in capsys.readouterr().out
