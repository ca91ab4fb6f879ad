//! Bad input: one clear error with the place and the mend, an exit code that is not 0, and never a panic.

use std::fs;

use crate::{Nvrtc, QWEN3, config, run};

/// An error with this exit code that says all of `expect`; nothing on stdout, nothing written.
#[track_caller]
fn check_error(files: &[(&str, &[u8])], args: &[&str], code: i32, expect: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let run = run(&folder, files, args, Nvrtc::Missing);
    assert_eq!(run.code, Some(code), "{}", run.stderr);
    assert_eq!(run.stdout, "");
    assert!(!folder.path().join("out").exists());
    assert!(run.stderr.starts_with("error"), "{}", run.stderr);
    for part in expect {
        assert!(
            run.stderr.contains(part),
            "{part:?} is not in: {}",
            run.stderr
        );
    }
}

/// The graph with one change, as `g.ron`.
#[track_caller]
fn check_graph(from: &str, to: &str, expect: &[&str]) {
    assert!(
        QWEN3.contains(from),
        "{from:?} is not in qwen3.ron any more"
    );
    let graph = QWEN3.replacen(from, to, 1);
    check_error(&[("g.ron", graph.as_bytes())], &["g.ron"], 1, expect);
}

#[test]
fn graphs_that_are_wrong() {
    check_graph(
        "name: \"qwen3\",",
        "name: \"qwen3\"",
        &["g.ron:16:5", "a comma follows every entry"],
    );
    check_graph("Silu(", "Sillu(", &["Sillu", "Silu", "g.ron:"]);
    check_graph(
        "q_rope\": Rope(input: \"q_norm\"",
        "q_rope\": Rope(input: \"q_nrom\"",
        &["q_nrom", "q_norm"],
    );
    check_graph(
        "Linear(input: \"attention_norm\"",
        "Linear(input: \"attention_residual\"",
        &["cycle", "g.ron:"],
    );
    check_graph(
        "kv_heads\": (keys: [\"num_key_value_heads\"], default: 8",
        "kv_heads\": (keys: [\"num_key_value_heads\"], default: 5",
        &["g.ron:"],
    );
    check_graph(
        "\"layers\": (keys: [\"num_hidden_layers\"], default: 28)",
        "\"layers\": (keys: [\"num_hidden_layers\"], default: 0)",
        &["g.ron:"],
    );
    check_error(&[("g.ron", b"")], &["g.ron"], 1, &["g.ron"]);
    check_error(
        &[("g.ron", b"\xff\xfe(")],
        &["g.ron"],
        1,
        &["g.ron cannot be read: it is not UTF-8 text (byte 0 is not)"],
    );
    check_error(
        &[("g.ron", "(".repeat(100_000).as_bytes())],
        &["g.ron"],
        1,
        &["g.ron"],
    );
}

#[test]
fn checkpoints_that_are_wrong() {
    let check = |text: &str, expect: &[&str]| {
        check_error(
            &[("m/config.json", text.as_bytes())],
            &["qwen3.ron", "--model", "m"],
            1,
            expect,
        );
    };
    let check_key =
        |key: &str, value: &str, expect: &[&str]| check(&config(&[(key, value)]), expect);
    let check_layers = |value: &str| {
        check_key(
            "num_hidden_layers",
            value,
            &["layers", value, "config.json"],
        );
    };
    check_layers("0");
    check_layers("1000000000000");
    check_layers("-1");
    check_layers("\"many\"");
    check_key("model_type", "\"llama\"", &["llama", "qwen3"]);
    check_key("vocab_size", "null", &["vocab_size"]);
    check(&config(&[])[..40], &["config.json", "not valid JSON"]);
    check("[]", &["config.json", "not a JSON object"]);
    check_error(
        &[],
        &["qwen3.ron", "--model", "none"],
        1,
        &[
            "none/config.json cannot be read: No such file",
            "--model takes",
        ],
    );
    check_error(
        &[],
        &["qwen3.ron", "--model", "qwen3.ron"],
        1,
        &["qwen3.ron/config.json cannot be read: Not a directory"],
    );
}

/// Sizes that the front end takes and the kernels do not.
#[test]
fn models_that_do_not_fit() {
    let check = |changes: &[(&str, &str)], args: &[&str], expect: &[&str]| {
        let config = config(changes);
        let args = [&["qwen3.ron", "--model", "m"], args].concat();
        check_error(&[("m/config.json", config.as_bytes())], &args, 1, expect);
    };
    check(
        &[("hidden_size", "72")],
        &[],
        &[
            "error[tile-size]: qkv",
            "72",
            "multiple of 16",
            "qwen3.ron:58:",
            "config.json",
        ],
    );
    check(
        &[("intermediate_size", "200")],
        &[],
        &["error[tile-size]: gate_up", "200", "qwen3.ron:74:"],
    );
    check(
        &[("head_dim", "96")],
        &[],
        &[
            "error[head-dim]: attention",
            "96",
            "64, 128 and 256",
            "qwen3.ron:69:",
        ],
    );
    check(
        &[("hidden_size", "131072")],
        &["--batch", "16"],
        &[
            "error: the activations",
            "shared memory",
            "help: choose a GPU",
        ],
    );
}

/// A file that a program wrote on one line, or that is no graph at all, does not flood the terminal.
#[test]
fn long_lines_are_not_echoed() {
    let long = "i".repeat(100_000);
    let check = |graph: String, expect: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let files: &[(&str, &[u8])] = &[("g.ron", graph.as_bytes())];
        let stderr = run(&folder, files, &["g.ron"], Nvrtc::Missing).stderr;
        let longest = stderr.lines().map(str::len).max();
        assert!(longest < Some(400), "{stderr}");
        check_error(files, &["g.ron"], 1, expect);
    };
    let one_line: Vec<&str> = QWEN3
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect();
    check(
        one_line.join(" ").replace("Silu(", "Sillu("),
        &["`Sillu`", "did you mean `Silu`?", "…", "g.ron:1:"],
    );
    check(
        QWEN3.replace("Silu(", &format!("S{long}lu(")),
        &["unknown operator", "…", "g.ron:76:"],
    );
    check(
        QWEN3.replace("\"q_rope\": ", &format!("\"{long}\": ")),
        &["an id cannot be", "…"],
    );
    check(
        QWEN3.replace("name: \"qwen3\"", &format!("name: \"{long}\"")),
        &["name", "…"],
    );
    check("(".repeat(100_000), &["nested too deeply", "…"]);
    check(long.clone(), &["g.ron:1:1", "…"]);
}

#[test]
fn command_lines_that_are_wrong() {
    let check = |args: &[&str], expect: &[&str]| check_error(&[], args, 2, expect);
    check(&[], &["GRAPH"]);
    check(
        &["qwen3.ron", "--arch", "sm_90"],
        &["did you mean \"sm_90a\"?", "known: sm_80, "],
    );
    check(&["qwen3.ron", "--batch", "65"], &["65", "1..=64"]);
    check(&["qwen3.ron", "--batch", "0"], &["0", "1..=64"]);
    check(&["qwen3.ron", "--batch", "abc"], &["abc", "--batch"]);
    check(&["qwen3.ron", "--batch", "-1"], &["-1"]);
    check(&["qwen3.ron", "--max-seq", "many"], &["many", "--max-seq"]);
    check(&["qwen3.ron", "--max-seq", "0"], &["0", "1..=1048576"]);
    check(
        &["qwen3.ron", "--max-seq", "1048577"],
        &["1048577", "1..=1048576"],
    );
    check(
        &["qwen3.ron", "--max-seq", "99999999999999999999"],
        &["--max-seq"],
    );
    check(&["qwen3.ron", "llama3.ron"], &["llama3.ron"]);
    check(&["qwen3.ron", "--modle", "m"], &["--modle", "--model"]);
}

#[test]
fn files_that_are_not_there_or_not_ours() {
    check_error(
        &[],
        &["qwen.ron"],
        1,
        &[
            "qwen.ron cannot be read: No such file",
            "there is llama3.ron, qwen3.ron",
        ],
    );
    check_error(
        &[],
        &["."],
        1,
        &[
            "the graph . cannot be read: Is a directory",
            "there is llama3.ron, qwen3.ron",
        ],
    );
    check_error(
        &[],
        &["nowhere/g.ron"],
        1,
        &["nowhere/g.ron cannot be read"],
    );
    check_error(
        &[("f", b"")],
        &["qwen3.ron", "-o", "f"],
        1,
        &["f cannot be written: File exists", "-o takes a folder"],
    );
    check_error(
        &[("f", b"")],
        &["qwen3.ron", "-o", "f/out"],
        1,
        &["f/out cannot be written: Not a directory"],
    );
    check_error(
        &[],
        &["/dev/zero"],
        1,
        &["/dev/zero cannot be read: it is larger than 4 MiB"],
    );
    // Nobody can make folders in /proc, not even root.
    check_error(
        &[],
        &["qwen3.ron", "-o", "/proc/out"],
        1,
        &["/proc/out cannot be written"],
    );
}

#[test]
fn an_output_file_in_the_way_is_named() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["kernel.cu", "manifest.json"] {
        let way = folder.path().join(format!("{name}/{name}"));
        fs::create_dir_all(&way).unwrap();
        let failed = run(&folder, &[], &["qwen3.ron", "-o", name], Nvrtc::Missing);
        assert_eq!((failed.code, failed.stdout.as_str()), (Some(1), ""));
        let expect = format!("error: {name}/{name} cannot be written: Is a directory");
        assert!(failed.stderr.starts_with(&expect), "{}", failed.stderr);
    }
}

#[test]
fn profiles_that_are_wrong() {
    let check = |profile: &str, expect: &[&str]| {
        let files: &[(&str, &[u8])] = &[("p.ron", profile.as_bytes())];
        let args = ["qwen3.ron", "--profile", "p.ron"];
        check_error(files, &args, 1, expect);
    };
    check("", &["p.ron:1:1: ", "\nhelp: ", "mirage-calibrate"]);
    let h100 = include_str!("../../../profiles/h100.ron");
    check(
        &h100.replace("(9, 0)", "(7, 5)"),
        &["compute capability 7.5, which mirage does not compile for"],
    );
    check_error(
        &[],
        &["qwen3.ron", "--profile", "none.ron"],
        1,
        &["none.ron cannot be read: ", "mirage-calibrate"],
    );
    check_error(
        &[("p.ron", h100.as_bytes())],
        &["qwen3.ron", "--profile", "p.ron", "--arch", "sm_80"],
        2,
        &["--profile <FILE>", "--arch"],
    );
}

/// Input from somebody else: one row each, with the graph and the config.json that are given, and words of the error.
#[test]
fn input_that_is_hostile() {
    let replaced = |from: &str, to: &str| {
        assert!(
            QWEN3.contains(from),
            "{from:?} is not in qwen3.ron any more"
        );
        QWEN3.replacen(from, to, 1)
    };
    let many = |count: usize, entry: &dyn Fn(usize) -> String| -> String {
        (0..count).map(entry).collect()
    };
    let operators = many(300, &|i| format!("\"x{i}\": Silu(input: \"tokens\"),"));
    let symbols = many(300, &|i| format!("\"x{i}\": (keys: [\"x\"], default: 1),"));
    let wrong = many(200, &|i| format!("\"x{i}\": Slu(input: \"tokens\"),"));
    let long = "w".repeat(3000);
    // Attention's result through twelve linears, each of which could be placed in four ways.
    let chain = many(12, &|i| {
        let input = match i {
            0 => "attention".to_owned(),
            _ => format!("chain{}", i - 1),
        };
        format!(
            "\"chain{i}\": Linear(input: \"{input}\", weight: \"c{i}.{{layer}}\", out: [\"heads * head_dim\"]),"
        )
    });
    let chained = QWEN3.replacen(
        "\"o\": Linear(input: \"attention\"",
        &format!("{chain} \"o\": Linear(input: \"chain11\""),
        1,
    );
    let graphs: [(String, &[&str]); 9] = [
        (
            replaced("before: {", &format!("before: {{ {operators}")),
            &["error[graph-limit]", "operators are too many: at most 256"],
        ),
        (
            replaced("dims: {", &format!("dims: {{ {symbols}")),
            &["error[graph-limit]", "dims and params are too many"],
        ),
        (
            replaced("before: {", &format!("before: {{ {wrong}")),
            &["`Slu`", "and 180 more errors in g.ron"],
        ),
        (
            replaced("model.norm.weight", &long),
            &["error[graph-limit]", "bytes of a weight's name"],
        ),
        (
            replaced("\"gate_silu\": Silu", "\"gate; */ int x\": Silu"),
            &["error[identifier]", "an id cannot be"],
        ),
        (
            replaced("name: \"qwen3\"", "name: \"../../etc\""),
            &["error[identifier]", "the graph's name"],
        ),
        (
            replaced("out: [\"ffn\"]", "out: [\"ffn * 18446744073709551615\"]"),
            &["error[expression]", "is out of range"],
        ),
        (
            replaced("out: [\"ffn\"]", &format!("out: [\"{}\"]", "(".repeat(190))),
            &["error[expression]"],
        ),
        (chained, &["error[layer-size]", "more than 256 ways"]),
    ];
    for (graph, words) in &graphs {
        check_error(&[("g.ron", graph.as_bytes())], &["g.ron"], 1, words);
    }
    let large = [
        ("num_hidden_layers", "1024"),
        ("hidden_size", "1048576"),
        ("intermediate_size", "16777216"),
    ];
    let configs: [(String, &[&str]); 5] = [
        (
            config(&large),
            &["error[model-limit]", "check the sizes in config.json"],
        ),
        (
            config(&[("rope_theta", "1e-300")]),
            &["error[invalid-value]", "no finite number"],
        ),
        (
            config(&[("rms_norm_eps", "1e300")]),
            &["error[invalid-value]", "eps is inf"],
        ),
        (
            "{\"a\":".repeat(100_000),
            &["config.json", "not valid JSON", "recursion limit"],
        ),
        (
            " ".repeat((4 << 20) + 1),
            &["config.json cannot be read: it is larger than 4 MiB"],
        ),
    ];
    for (config, words) in &configs {
        let files: &[(&str, &[u8])] = &[("m/config.json", config.as_bytes())];
        check_error(files, &["qwen3.ron", "--model", "m"], 1, words);
    }
}
