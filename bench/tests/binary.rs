//! The real binary: flags, bad input, outputs, Ctrl-C. Runs of the model are as short as they can be.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny")
}

/// A folder for the outputs, where the binary runs.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        Bench {
            dir: tempfile::tempdir().expect("a folder"),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mirage-bench"));
        command
            .current_dir(self.dir.path())
            .env("HF_HUB_CACHE", self.path("no-cache"));
        command.args(["--device", "cpu", "--model"]).arg(tiny());
        command.args(line.split_whitespace());
        command
    }

    /// The shortest run there is, with more flags.
    fn short(&self, line: &str) -> Output {
        let line = format!(
            "--max-tokens 2 --num-warmup 0 --num-iterations 2 --batch-sizes 1 --categories short {line}"
        );
        self.command(&line).output().expect("the binary starts")
    }

    /// A run that gets Ctrl-C once it says `when` on stderr; with what it says there afterwards.
    #[cfg(unix)]
    fn interrupted(&self, line: &str, when: &str) -> (Output, Vec<String>) {
        use std::io::{BufRead as _, BufReader};

        let mut child = self
            .command(line)
            .stderr(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut lines = BufReader::new(child.stderr.take().expect("stderr"))
            .lines()
            .map_while(Result::ok);
        assert!(lines.any(|line| line.contains(when)), "it comes to {when}");
        let pid = child.id().to_string();
        let killed = Command::new("kill").args(["-INT", &pid]).status();
        assert!(killed.expect("kill").success());
        // Read on, so that the pipe does not fill.
        let rest = lines.collect();
        (child.wait_with_output().expect("it ends"), rest)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn results(&self) -> Value {
        serde_json::from_str(&self.read("benchmark_results.json")).expect("JSON")
    }

    fn files(&self) -> usize {
        fs::read_dir(self.dir.path()).expect("the folder").count()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The run fails with this exit code, with these words on stderr and without a panic.
fn check_refused(output: &Output, code: i32, words: &[&str]) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "`{word}` is not in: {stderr}");
    }
}

#[test]
fn a_run_writes_all_reports() {
    let bench = Bench::new();
    let output = bench.short("");
    let stdout = text(&output.stdout);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}{stdout}",
        text(&output.stderr)
    );
    assert_eq!(text(&output.stderr), "", "stderr is quiet in a pipe");
    for part in [
        "| batch |",
        "Sample: ",
        "agree",
        "say nothing about",
        "plain reference",
    ] {
        assert!(stdout.contains(part), "`{part}` is not in: {stdout}");
    }
    let report = bench.read("benchmark_report.txt");
    for part in [
        "MIRAGE PERFORMANCE BENCHMARK REPORT",
        "CONFIGURATION",
        "Max tokens: 2",
        "DETAILED RESULTS BY BATCH SIZE",
        "Batch Size: 1",
        "LATENCY (ms):",
        "Baseline:",
        "Mirage:",
        "Speedup:",
        "THROUGHPUT (tokens/s):",
        "SUMMARY",
        "Average Latency Speedup:",
        "Average Throughput Speedup:",
        "These are times of a CPU.",
    ] {
        assert!(report.contains(part), "`{part}` is not in: {report}");
    }
    let results = bench.results();
    assert_eq!(results["complete"], true);
    let sides = results["points"][0]["sides"].as_array().expect("sides");
    assert_eq!(sides.len(), 2);
    assert!(sides.iter().all(|side| {
        side["iterations"]
            .as_array()
            .is_some_and(|rows| rows.len() == 2)
    }));
    assert_eq!(results["points"][0]["gate"]["passed"], true);
    check_page(&bench.read("benchmark_report.html"));
}

/// No request leaves the page, and it stands alone.
fn check_page(page: &str) {
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    for forbidden in [
        "<script", "src=", "href=", "http://", "https://", "@import", "url(http", "NaN",
    ] {
        assert!(!page.contains(forbidden), "`{forbidden}` is in the page");
    }
    assert!(page.contains("default-src 'none'") && page.contains("<svg"));
}

#[test]
fn the_json_follows_its_schema() {
    let bench = Bench::new();
    assert_eq!(
        bench
            .short("--output-report r.txt --output-html r.html")
            .status
            .code(),
        Some(0)
    );
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("results.schema.json");
    let committed: Value =
        serde_json::from_str(&fs::read_to_string(file).expect("the schema")).expect("JSON");
    let validator = jsonschema::validator_for(&committed).expect("a schema");
    let mut results = bench.results();
    let errors: Vec<String> = validator
        .iter_errors(&results)
        .map(|error| error.to_string())
        .collect();
    assert!(errors.is_empty(), "{errors:?}");
    results["points"][0]["sides"][0]["latency_ms"]["mean"] = Value::from("fast");
    assert!(!validator.is_valid(&results), "the schema takes anything");
    assert!(
        bench.path("r.txt").exists()
            && bench.path("r.html").exists()
            && !bench.path("benchmark_report.txt").exists()
    );
}

#[test]
fn the_committed_schema_is_the_programs() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("results.schema.json");
    let made =
        serde_json::to_string_pretty(&mirage_bench::report::json::schema()).expect("JSON") + "\n";
    if std::env::var_os("UPDATE_SCHEMA").is_some() {
        fs::write(&file, &made).expect("the schema is written");
    }
    let committed = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        committed == made,
        "bench/results.schema.json is out of date: run this test with UPDATE_SCHEMA=1, and think of SCHEMA_VERSION"
    );
}

#[test]
fn one_side_alone() {
    let bench = Bench::new();
    let output = bench.short("--skip-baseline");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("No baseline was run"));
    assert_eq!(bench.results()["points"][0]["sides"][0]["side"], "mirage");
    let output = bench.short("--skip-mirage --verbose");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(
        bench.results()["points"][0]["sides"][0]["side"],
        "reference"
    );
    assert!(
        text(&output.stderr).contains("iteration 2 of plain reference"),
        "--verbose tells: {}",
        text(&output.stderr)
    );
}

#[test]
fn a_run_is_compared_with_an_older_one() {
    let bench = Bench::new();
    assert_eq!(
        bench
            .short("--skip-baseline --output-json old.json")
            .status
            .code(),
        Some(0)
    );
    // As if the old run had been a thousand times faster.
    let mut old: Value = serde_json::from_str(&bench.read("old.json")).expect("JSON");
    for row in old["points"][0]["sides"][0]["iterations"]
        .as_array_mut()
        .expect("iterations")
    {
        row["latency_ms"] = Value::from(row["latency_ms"].as_f64().expect("a number") / 1000.0);
    }
    fs::write(bench.path("fast.json"), old.to_string()).expect("a file");
    let output = bench.short("--skip-baseline --compare fast.json");
    assert_eq!(output.status.code(), Some(4), "{}", text(&output.stdout));
    assert!(text(&output.stdout).contains("SLOWER"));
    // Another seed is other work: told, and neither a regression nor a success.
    let output = bench.short("--skip-baseline --compare fast.json --seed 7");
    assert_eq!(output.status.code(), Some(6), "{}", text(&output.stdout));
    assert!(text(&output.stdout).contains("NOT COMPARABLE, --seed: 0 before, 7 now"));
    // So are other prompts of the same file.
    let output = bench.short("--skip-baseline --compare fast.json --categories medium");
    assert_eq!(output.status.code(), Some(6), "{}", text(&output.stdout));
    let stdout = text(&output.stdout);
    assert!(stdout.contains("NOT COMPARABLE, --categories: short before, short medium now"));
    // A batch size that comes first takes the first prompts.
    let line =
        "--max-tokens 2 --num-warmup 0 --num-iterations 2 --batch-sizes 2 1 --categories short";
    let output = bench
        .command(&format!("{line} --skip-baseline --compare fast.json"))
        .output()
        .expect("the binary starts");
    assert_eq!(output.status.code(), Some(6), "{}", text(&output.stdout));
    assert!(text(&output.stdout).contains("NOT COMPARABLE, other prompts"));

    fs::write(bench.path("bad.json"), "{}").expect("a file");
    check_refused(
        &bench.short("--compare bad.json"),
        1,
        &["bad.json", "not a result file"],
    );
    fs::write(bench.path("bad.json"), r#"{"schema_version": 999}"#).expect("a file");
    check_refused(
        &bench.short("--compare bad.json"),
        1,
        &["schema version 999"],
    );
    check_refused(
        &bench.short("--compare none.json"),
        1,
        &["none.json cannot be read"],
    );
}

#[test]
fn another_engines_numbers_are_quoted() {
    let bench = Bench::new();
    let external = r#"{"format": "mirage-external", "version": 1, "engine": "Other | engine", "device": "somewhere",
        "points": [{"batch": 1, "iterations": [{"latency_ms": 5.0, "tokens": 2}, {"latency_ms": 5.5, "tokens": 2}]},
                   {"batch": 3, "iterations": [{"latency_ms": 5.0, "tokens": 2}]}]}"#;
    fs::write(bench.path("other.json"), external).expect("a file");
    let output = bench.short("--skip-baseline --external other.json");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("Other \\| engine (external)"));
    assert!(
        bench
            .read("benchmark_report.txt")
            .contains("external: measured elsewhere, not checked")
    );
    assert_eq!(
        bench.results()["points"][0]["speedups"][0]["against"],
        "external1"
    );
    assert!(text(&output.stdout).contains("No baseline was run"));
    // Of other work there is no speedup, and the report says so.
    fs::write(
        bench.path("other.json"),
        external.replace("\"tokens\": 2", "\"tokens\": 1"),
    )
    .expect("a file");
    let output = bench.short("--skip-baseline --external other.json");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let point = &bench.results()["points"][0];
    assert_eq!(point["speedups"], Value::Array(Vec::new()));
    assert_eq!(point["only_quoted"][0]["side"], "external1");
    assert!(
        bench
            .read("benchmark_report.txt")
            .contains("(external) IS GIVEN: it made 1.0 tokens an iteration, mirage 2.0")
    );
    for (bad, word) in [
        ("{", "not in the format"),
        (&external.replace("5.0", "-1.0"), "must be positive"),
        (
            &external.replace("\"version\": 1", "\"version\": 2"),
            "version 2",
        ),
    ] {
        fs::write(bench.path("other.json"), bad).expect("a file");
        check_refused(
            &bench.short("--external other.json"),
            1,
            &["other.json", word],
        );
    }
}

#[test]
fn bad_values_name_the_flag() {
    let bench = Bench::new();
    for (line, word) in [
        ("--batch-sizes 0", "--batch-sizes"),
        ("--batch-sizes 65", "1..=64"),
        ("--temperature -1", "0 (greedy)"),
        ("--top-p 2", "at most 1"),
        ("--max-tokens 0", "--max-tokens"),
        ("--num-iterations x", "--num-iterations"),
        ("--skip-baseline --skip-mirage", "cannot be used with"),
        ("--no-such-flag", "--no-such-flag"),
    ] {
        check_refused(
            &bench.command(line).output().expect("the binary starts"),
            2,
            &[word],
        );
    }
    for (line, words) in [
        ("--baseline b1", ["need a GPU", "reference"]),
        ("--context-depth 2047", ["context of 2048", "smaller"]),
        ("--categories shrot", ["shrot", "short, medium"]),
        (
            "--max-tokens 3000",
            ["none of the prompts fits", "--max-tokens"],
        ),
    ] {
        check_refused(
            &bench.command(line).output().expect("the binary starts"),
            1,
            &words,
        );
    }
    assert_eq!(bench.files(), 0, "a refused run leaves no file");
}

#[test]
fn models_that_are_not_there() {
    let bench = Bench::new();
    let run = |model: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mirage-bench"));
        command
            .current_dir(bench.dir.path())
            .env("HF_HUB_CACHE", bench.path("no-cache"));
        command
            .args(["--device", "cpu", "--model", model])
            .output()
            .expect("the binary starts")
    };
    check_refused(
        &run("Qwen/Qwen3-0.6B"),
        1,
        &["hf download Qwen/Qwen3-0.6B", "--model models/tiny"],
    );
    check_refused(&run("./nowhere"), 1, &["no such folder"]);
    check_refused(&run("."), 1, &["no config.json"]);
}

#[test]
fn damaged_weights_leave_older_reports() {
    let weights = fs::read(tiny().join("model.safetensors")).unwrap();
    let check = |weights: &[u8], words: &[&str]| {
        let bench = Bench::new();
        for file in ["config.json", "tokenizer.json"] {
            fs::copy(tiny().join(file), bench.path(file)).unwrap();
        }
        fs::write(bench.path("model.safetensors"), weights).unwrap();
        fs::write(bench.path("benchmark_results.json"), "older").unwrap();
        let run = Command::new(env!("CARGO_BIN_EXE_mirage-bench"))
            .current_dir(bench.dir.path())
            .args("--model . --device cpu --batch-sizes 1 --max-tokens 2".split(' '))
            .output()
            .expect("the binary starts");
        check_refused(&run, 1, words);
        assert_eq!(bench.read("benchmark_results.json"), "older");
    };
    check(
        &weights[..weights.len() - 9],
        &["truncated", "download it again"],
    );
    // The name stands in the header at the file's beginning.
    let mut renamed = weights.clone();
    let name = b"layers.0.self_attn.q_proj";
    let at = weights.windows(name.len()).position(|w| w == name).unwrap();
    renamed[at..][..name.len()].copy_from_slice(b"layers.0.self_attn.q_prok");
    check(
        &renamed,
        &[
            "nothing was measured",
            "no tensor model.layers.0.self_attn.q_proj.weight",
        ],
    );
}

#[test]
fn prompt_files() {
    let bench = Bench::new();
    check_refused(
        &bench.short("--prompts none.txt"),
        1,
        &["none.txt cannot be read", "built-in"],
    );
    for (content, words) in [
        ("", ["p.txt", "no prompts"]),
        ("# only a comment\n@a\n", ["p.txt", "no prompts"]),
        ("fine\n\"open\n", ["p.txt:2", "JSON string"]),
    ] {
        fs::write(bench.path("p.txt"), content).expect("a file");
        check_refused(
            &bench
                .command("--prompts p.txt")
                .output()
                .expect("the binary starts"),
            1,
            &words,
        );
    }
    // A file of our own, with a prompt that does not fit: left out, and said.
    let long = "word ".repeat(3000);
    fs::write(
        bench.path("p.txt"),
        format!("@mine\nHello there\r\n{long}\n"),
    )
    .expect("a file");
    let output = bench
        .command("--prompts p.txt --max-tokens 2 --num-warmup 0 --num-iterations 1 --batch-sizes 2 --skip-baseline")
        .output()
        .expect("the binary starts");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report = bench.read("benchmark_report.txt");
    assert!(
        report.contains("1 of 2 fit") && report.contains("left out mine/2"),
        "{report}"
    );
}

#[test]
fn outputs_that_cannot_be_written_are_found_out_first() {
    let bench = Bench::new();
    for flag in ["--output-report", "--output-json", "--output-html"] {
        let output = bench.short(&format!("{flag} no/such/folder/file"));
        check_refused(&output, 1, &["no/such/folder/file cannot be written"]);
    }
    assert_eq!(bench.files(), 0);
}

#[test]
fn no_output_overwrites_another_file_of_the_run() {
    let bench = Bench::new();
    fs::write(bench.path("old.json"), "kept").expect("a file");
    for (line, words) in [
        (
            "--output-json a --output-html ./a",
            ["--output-html ./a", "--output-json names the same file"],
        ),
        (
            "--output-json old.json --compare old.json",
            ["--output-json old.json", "--compare names the same file"],
        ),
        (
            "--output-html old.json --external old.json",
            ["--output-html old.json", "--external names the same file"],
        ),
    ] {
        check_refused(&bench.short(line), 1, &words);
    }
    assert_eq!(bench.read("old.json"), "kept");
    assert_eq!(bench.files(), 1);
}

#[test]
fn a_point_is_measured_once() {
    let bench = Bench::new();
    let line =
        "--skip-baseline --max-tokens 2 --num-warmup 0 --num-iterations 1 --categories short";
    let output = bench
        .command(&format!("{line} --batch-sizes 2 1 2 --context-depth 4 3 4"))
        .output()
        .expect("the binary starts");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let results = bench.results();
    assert_eq!(results["configuration"]["batch_sizes"], json!([2, 1]));
    assert_eq!(results["configuration"]["context_depths"], json!([4, 3]));
    assert_eq!(results["points"].as_array().map(Vec::len), Some(4));
    assert_eq!(results["prompts"]["categories"], json!(["short"]));
}

#[test]
#[cfg(unix)]
fn ctrl_c_leaves_a_valid_partial_report() {
    let bench = Bench::new();
    let (output, rest) = bench.interrupted(
        "--max-tokens 4 --num-warmup 0 --num-iterations 100000 --batch-sizes 1 2 --categories short --verbose",
        "iteration 2 of",
    );
    assert_eq!(output.status.code(), Some(130), "{rest:?}");
    let results = bench.results();
    assert_eq!(results["complete"], false);
    let sides = results["points"][0]["sides"].as_array().expect("sides");
    let counts: Vec<usize> = sides
        .iter()
        .filter_map(|side| Some(side["iterations"].as_array()?.len()))
        .collect();
    assert!(
        counts.len() == 2 && counts[0] == counts[1] && counts[0] >= 1,
        "{counts:?}"
    );
    assert!(bench.read("benchmark_report.txt").contains("PARTIAL"));
    assert_eq!(results["ended_early"], "interrupted");
    assert!(text(&output.stdout).contains("partial results: interrupted"));
    check_page(&bench.read("benchmark_report.html"));
}

#[test]
#[cfg(unix)]
fn ctrl_c_before_anything_was_measured_leaves_older_reports() {
    let bench = Bench::new();
    fs::write(bench.path("benchmark_results.json"), "older").expect("a file");
    let (output, rest) = bench.interrupted(
        "--max-tokens 4 --num-warmup 100000 --batch-sizes 1 --categories short --verbose",
        "preparing",
    );
    assert_eq!(output.status.code(), Some(130), "{rest:?}");
    assert!(
        rest.iter()
            .any(|line| line.contains("nothing was measured")),
        "{rest:?}"
    );
    assert_eq!(bench.read("benchmark_results.json"), "older");
    assert_eq!(bench.files(), 1);
}
