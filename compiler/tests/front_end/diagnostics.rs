//! Every error a graph file or a config.json can have, as the reader sees it.

use mirage_compiler::diagnostics::Diagnostics;
use mirage_compiler::fuse::FusedGraph;
use mirage_compiler::graph::Graph;
use mirage_compiler::typed::{ModelConfig, TypedGraph};

use crate::{LLAMA3, QWEN3, snapshot};

fn compile(graph: &str, config: Option<&str>) -> Result<FusedGraph, Diagnostics> {
    let graph = Graph::parse(graph, "graphs/test.ron")?;
    let config = config.map_or(Ok(ModelConfig::none()), |text| {
        ModelConfig::parse(text, "model/config.json")
    })?;
    FusedGraph::new(&TypedGraph::new(&graph, &config)?)
}

/// Compares the error of `graphs/qwen3.ron` with some of its text replaced.
fn check(name: &str, changes: &[(&str, &str)]) {
    let mut text = QWEN3.to_owned();
    for (from, to) in changes {
        assert!(text.contains(from), "`{from}` is not in the graph");
        text = text.replacen(from, to, 1);
    }
    let error = compile(&text, None).expect_err(name);
    snapshot("diagnostics", name, &error.to_string());
}

/// Compares the error of `graphs/qwen3.ron` with a config.json that has other values.
fn check_config(name: &str, changes: &[(&str, &str)]) {
    let mut config = serde_json::json!({
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    });
    compile(QWEN3, Some(&config.to_string())).unwrap_or_else(|error| panic!("{error}"));
    for (key, value) in changes {
        config[key] = serde_json::from_str(value).unwrap();
    }
    let error = compile(QWEN3, Some(&config.to_string())).expect_err(name);
    snapshot("diagnostics", name, &error.to_string());
}

#[test]
fn syntax() {
    check("missing_comma", &[("default: 1024),", "default: 1024)")]);
    check("unclosed_string", &[("name: \"qwen3\",", "name: \"qwen3,")]);
    check("truncated", &[(&QWEN3[QWEN3.len() / 2..], "")]);
    check(
        "unknown_operator",
        &[("Linear(input: \"gated\"", "Liner(input: \"gated\"")],
    );
    check(
        "unknown_operator_far",
        &[("Silu(input", "Convolution(input")],
    );
    check(
        "unknown_field",
        &[(
            "RmsNorm(input: \"q\", weight",
            "RmsNorm(input: \"q\", wieght",
        )],
    );
    check("unknown_top_field", &[("before: {", "befor: {")]);
    check(
        "missing_field",
        &[(
            "Rope(input: \"q_norm\", theta: \"theta\")",
            "Rope(input: \"q_norm\")",
        )],
    );
    check("wrong_type", &[("KvAppend(k: \"k_rope\"", "KvAppend(k: 3")]);
    check(
        "bad_expression",
        &[("out: [\"kv_heads\"", "out: [\"kv_heads +\"")],
    );
    assert!(compile("", None).is_err());
}

#[test]
fn names() {
    check(
        "undefined_value",
        &[("Rope(input: \"q_norm\"", "Rope(input: \"q_nrom\"")],
    );
    check(
        "value_of_another_section",
        &[("RmsNorm(input: \"q\"", "RmsNorm(input: \"embedded\"")],
    );
    check("duplicate_id", &[("\"up\": Linear", "\"gate\": Linear")]);
    check("unused_value", &[("b: \"up\"", "b: \"gate_silu\"")]);
    check(
        "bad_identifier",
        &[
            ("\"gate_silu\": Silu", "\"gate silu\": Silu"),
            ("a: \"gate_silu\"", "a: \"gate silu\""),
        ],
    );
    check("undefined_symbol", &[("out: [\"heads\"", "out: [\"heds\"")]);
    check(
        "weight_without_layer",
        &[(
            "model.layers.{layer}.mlp.up_proj",
            "model.layers.0.mlp.up_proj",
        )],
    );
    check(
        "no_sample",
        &[("\"next_token\": Sample(logits: \"logits\"),", "")],
    );
    check("cycle", &[("RmsNorm(input: \"q\"", "RmsNorm(input: \"o\"")]);
    check(
        "cycle_of_one",
        &[("Silu(input: \"gate\")", "Silu(input: \"gate_silu\")")],
    );
    check(
        "several_at_once",
        &[
            ("Silu(input: \"gate\")", "Sliu(input: \"gate\")"),
            ("Rope(input: \"k_norm\"", "Rope(inptu: \"k_norm\""),
        ],
    );
}

#[test]
fn shapes() {
    check(
        "add_of_two_shapes",
        &[(
            "mlp.down_proj.weight\", out: [\"hidden\"]",
            "mlp.down_proj.weight\", out: [\"ffn\"]",
        )],
    );
    check(
        "rope_of_no_heads",
        &[(
            "self_attn.q_proj.weight\", out: [\"heads\", \"head_dim\"]",
            "self_attn.q_proj.weight\", out: [\"heads * head_dim\"]",
        )],
    );
    check(
        "heads_that_do_not_divide",
        &[(
            "default: 8, absent: \"heads\"",
            "default: 7, absent: \"heads\"",
        )],
    );
    check(
        "cache_that_is_none",
        &[("cache: \"cache\"", "cache: \"k_rope\"")],
    );
    check(
        "state_of_another_shape",
        &[
            ("next: \"ffn_residual\"", "next: \"gated\""),
            (
                "\"ffn_residual\": Add(a: \"attention_residual\", b: \"down\"),",
                "",
            ),
            (
                "            \"down\": Linear(input: \"gated\", weight: \"model.layers.{layer}.mlp.down_proj.weight\", out: [\"hidden\"]),\n",
                "",
            ),
        ],
    );
    check(
        "weight_of_two_shapes",
        &[(
            "weight: \"model.layers.{layer}.mlp.up_proj",
            "weight: \"model.layers.{layer}.self_attn.k_proj",
        )],
    );
    check(
        "head_of_another_vocabulary",
        &[
            (
                "rows: \"vocab\",\n            weight",
                "rows: 1000,\n            weight",
            ),
            ("tied: \"tied\"", "tied: false"),
        ],
    );
}

#[test]
fn fusion() {
    check(
        "mul_without_silu",
        &[
            (
                "Mul(a: \"gate_silu\", b: \"up\")",
                "Mul(a: \"gate\", b: \"up\")",
            ),
            ("\"gate_silu\": Silu(input: \"gate\"),", ""),
        ],
    );
    check(
        "k_without_rope",
        &[
            ("KvAppend(k: \"k_rope\"", "KvAppend(k: \"k_norm\""),
            ("\"k_rope\": Rope(input: \"k_norm\", theta: \"theta\"),", ""),
        ],
    );
    check(
        "norm_between_layers",
        &[
            ("next: \"ffn_residual\"", "next: \"last_norm\""),
            (
                "\"ffn_residual\": Add",
                "\"last_norm\": RmsNorm(input: \"ffn_residual\", weight: \"{layer}.n\", eps: \"eps\"), \"ffn_residual\": Add",
            ),
        ],
    );
    check(
        "residual_of_the_old_state",
        &[(
            "Add(a: \"attention_residual\", b: \"down\")",
            "Add(a: \"x\", b: \"down\")",
        )],
    );
    check(
        "operator_before_the_layers",
        &[
            ("first: \"embedded\"", "first: \"scaled\""),
            (
                "before: {",
                "before: { \"scaled\": Silu(input: \"embedded\"),",
            ),
        ],
    );
}

#[test]
fn config() {
    check_config("config_no_layers", &[("num_hidden_layers", "0")]);
    check_config(
        "config_many_layers",
        &[("num_hidden_layers", "1000000000000")],
    );
    check_config("config_too_many_layers", &[("num_hidden_layers", "4096")]);
    check_config(
        "config_absurd_dims",
        &[
            ("hidden_size", "18446744073709551615"),
            ("vocab_size", "-1"),
        ],
    );
    check_config("config_fraction", &[("intermediate_size", "3072.5")]);
    check_config("config_string", &[("hidden_size", "\"1024\"")]);
    check_config(
        "config_null",
        &[("num_hidden_layers", "null"), ("rope_theta", "null")],
    );
    check_config(
        "config_number_for_condition",
        &[("tie_word_embeddings", "3")],
    );
    check_config("config_theta", &[("rope_theta", "0")]);
    check_config(
        "config_product_too_large",
        &[
            ("num_attention_heads", "16000000"),
            ("head_dim", "16000000"),
        ],
    );
    check_config(
        "config_other_model",
        &[("model_type", "\"mistral\""), ("hidden_act", "\"gelu\"")],
    );
    check_config(
        "config_other_rope",
        &[("rope_scaling", r#"{"rope_type": "yarn", "factor": 4.0}"#)],
    );
    for (name, text) in [
        ("config_syntax", "{\n  \"hidden_size\": 1024,\n  oops\n}"),
        ("config_list", "[]"),
        ("config_empty", ""),
    ] {
        snapshot(
            "diagnostics",
            name,
            &compile(QWEN3, Some(text)).expect_err(name).to_string(),
        );
    }
}

#[test]
fn config_expression_that_does_not_come_out() {
    let config = r#"{
        "hidden_size": 1000, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 7,
        "vocab_size": 100, "rms_norm_eps": 1e-5, "rope_theta": 5e5
    }"#;
    let error = compile(LLAMA3, Some(config)).unwrap_err();
    snapshot("diagnostics", "config_remainder", &error.to_string());
}

#[test]
fn no_text_makes_it_panic() {
    // Every prefix of a graph, and the graph without any one of its lines.
    for end in (0..QWEN3.len())
        .step_by(97)
        .filter(|end| QWEN3.is_char_boundary(*end))
    {
        assert!(compile(&QWEN3[..end], None).is_err());
    }
    for skip in 0..QWEN3.lines().count() {
        let text: String = QWEN3
            .lines()
            .enumerate()
            .filter(|(at, _)| *at != skip)
            .map(|(_, line)| format!("{line}\n"))
            .collect();
        if let Err(error) = compile(&text, None) {
            assert!(error.to_string().contains("graphs/test.ron:"), "{error}");
        }
    }
}

#[test]
fn deep_nesting_is_refused() {
    let text = QWEN3.replace("default: 28", &format!("default: {}", "(".repeat(100_000)));
    assert!(
        compile(&text, None)
            .unwrap_err()
            .to_string()
            .contains("ron-syntax")
    );
}
