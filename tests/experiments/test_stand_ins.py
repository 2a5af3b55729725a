"""Every script of experiments/ runs to its end on rendered scenes; what it measured stands apart from what is
published."""

import json

from PIL import Image


def table_of(out, name):
    """(titles of the columns, {label: {title and measure: value}}) of published and measured rows."""
    table = json.loads((out / f"{name}.json").read_text())
    titles = {column["key"]: (column["title"], column["measure"]) for column in table["columns"]}
    rows = [{}, {}]
    for row in table["rows"]:
        rows[row["published"]][row["label"]] = {titles[key]: cell["value"] for key, cell in row["cells"].items()}
    assert Image.open(out / f"{name}.png").width > 200
    return rows[1], rows[0]


def apart(measured):
    """Whether all that was measured stands under the name of the stand-in."""
    return all("scenes, a stand-in" in title for row in measured.values() for title, _ in row)


def test_single_tokens_are_measured_once_for_tables_1_and_4(run, out, capsys):
    assert run("table1", out, "--stand_in") == 0
    printed = capsys.readouterr().out
    assert "published: DINOv2-g, normal | 65.8 ± 0.1 | 53.1 ± 0.3 | 17.1 ± 0.5 |" in printed
    published, measured = table_of(out, "table1")
    assert set(measured) == {"tiny, cls", "tiny, normal", "tiny, outlier", "tiny, register0"} and apart(measured)
    assert all(0 <= value <= 100 for row in measured.values() for value in row.values())
    assert len(published["DINOv2-g, outlier"]) == 14
    assert "% of training and" in printed and "2 draws" in printed
    results = out / "tiny/eval/tokens-scenes/results.json"
    before = results.stat().st_mtime_ns
    assert run("table4", out, "--stand_in") == 0
    assert results.stat().st_mtime_ns == before
    published, again = table_of(out, "table4")
    assert again == measured and published["1 register, cls"] == {("Airc", "mean per class, %"): 85.2}


def test_dense_probes_are_measured_once_for_table_2_and_figure_8(run, out, capsys):
    assert run("table2", out, "--stand_in") == 0
    published, measured = table_of(out, "table2")
    assert published["DINOv2, 4 registers"][("ADE20k", "mIoU, %")] == 47.9
    assert [measure for _, measure in measured["tiny"]] == [
        *("top-1, %", "mIoU, %", "RMSE of lin-1, m", "RMSE of lin-4, m")
    ]
    assert apart(measured) and "joins with the OpenCLIP recipe" in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in out.glob("tiny/eval/*/results.json")}
    assert run("figure8", out, "--stand_in") == 0
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert table_of(out, "figure8") == ({}, measured)


def test_object_discovery_tells_what_was_tuned(run, out, capsys):
    assert run("table3", out, "--stand_in", "--sweep", "--feature=tiny=v") == 0
    published, measured = table_of(out, "table3")
    assert list(published["LOST, DINO ViT-S/16"].values()) == [61.9, 64.0, 50.7]
    assert set(measured) == {"tiny", "tiny (tuned)"} and apart(measured)
    printed = capsys.readouterr().out
    assert "LOST on v of block -1, bias 0\n" in printed
    assert "the best of 6 settings on the very images it is measured on" in printed
    assert run("table3", out, "--stand_in", "--feature=tiny=x") == 2
    assert "NAME=q" in capsys.readouterr().err


def test_local_probes_stand_apart_because_the_published_images_are_not_known(run, out):
    assert run("table5", out, "--stand_in") == 0
    published, measured = table_of(out, "table5")
    figure = published["DINOv2-g (figure 5b)"]
    assert figure[("images not said", "outlier patches: distance to the place, patches")] == 5.09
    assert apart(measured) and len(measured["tiny"]) == 6


def test_registers_are_read_from_what_was_measured(script, tmp_path):
    figure8 = script("figure8/run")
    import results_table

    column = results_table.Column("a", "A", "top-1, %")
    table = results_table.Table("t", [column], [])
    for registers in (16, 0, 4):
        results = tmp_path / f"{registers}.json"
        results.write_text(json.dumps({"model": {"config": {"registers": registers}}}))
        table.put(f"R{registers}", column, results_table.Cell(1.0 + registers, results=str(results)))
    assert [figure8.registers(row) for row in table.rows] == [16, 0, 4]
    figure8.draw(table, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 200


def test_the_networks_of_the_stand_in_are_made_once(script, tmp_path):
    script("table1/run")
    import stand_ins

    import regvit_jax as rv

    made = stand_ins.models(tmp_path)
    assert [rv.load_model(path).config.registers for path in made.values()] == [0, 4]
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")}
    assert stand_ins.models(tmp_path) == made
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")}
