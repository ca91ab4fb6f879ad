//! The model of a run: finding it, and everything that is read of it once.
//!
//! Owns the search for a checkpoint folder, the choice of the operator graph, and the facts for the report. It must not
//! download anything, and it loads no weights: the sides do.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use mirage_compiler::graph::Graph;
use mirage_compiler::input::{MAX_TEXT, read_text};
use mirage_compiler::ops::Load;
use mirage_compiler::typed::{ModelConfig, TypedGraph};
use mirage_runtime::checkpoint::Checkpoint;
use mirage_runtime::tokenizer::{Tokenizer, stop_tokens};

use crate::results::ModelFacts;

/// Graphs that come with the program, by `model_type` of a config.json.
const GRAPHS: [(&str, &str, &str); 2] = [
    (
        "qwen3",
        "graphs/qwen3.ron",
        include_str!("../../graphs/qwen3.ron"),
    ),
    (
        "llama",
        "graphs/llama3.ron",
        include_str!("../../graphs/llama3.ron"),
    ),
];

/// Largest `refs/main` of the Hugging Face cache, in bytes: the hash of a revision.
const MAX_REF: usize = 4096;

/// Context of a model whose config.json does not name one.
const DEFAULT_CONTEXT: usize = 4096;

/// A checkpoint with its graph.
pub struct Model {
    /// As it was asked for.
    pub name: String,
    /// Weights and config.json.
    pub checkpoint: Checkpoint,
    /// Text to tokens.
    pub tokenizer: Tokenizer,
    /// Tokens that end a text.
    pub stop_tokens: Vec<u32>,
    /// Text of the operator graph.
    pub graph_text: String,
    /// Its name in errors.
    pub graph_name: String,
    /// config.json for the compiler.
    pub config: ModelConfig,
    /// The graph with this model's sizes.
    pub typed: TypedGraph,
    /// For the report.
    pub facts: ModelFacts,
}

impl Model {
    /// Opens a checkpoint: a folder, or an id such as `Qwen/Qwen3-0.6B` of the local Hugging Face cache. `graph` is used
    /// in place of the graph that comes with the program.
    ///
    /// # Errors
    /// What is missing or wrong, and how to get it.
    pub fn open(name: &str, graph: Option<&Path>) -> Result<Model> {
        let dir = find(
            name,
            &hub_caches(|variable| std::env::var_os(variable).map(PathBuf::from)),
        )?;
        let checkpoint = Checkpoint::open(&dir)?;
        let tokenizer = Tokenizer::open(&dir)?;
        let stop_tokens = stop_tokens(&dir, checkpoint.config())?;
        let (graph_name, graph_text) = match graph {
            Some(path) => {
                let text = read_text(path, MAX_TEXT)
                    .with_context(|| format!("the graph {} cannot be read", path.display()))?;
                (path.display().to_string(), text)
            }
            None => built_in_graph(
                checkpoint
                    .config()
                    .get("model_type")
                    .and_then(|value| value.as_str()),
                &dir,
            )?,
        };
        let file = dir.join("config.json");
        let config = ModelConfig::parse(checkpoint.config_text(), &file.to_string_lossy())?;
        let typed = TypedGraph::new(&Graph::parse(&graph_text, &graph_name)?, &config)?;
        let facts = facts(
            name,
            &checkpoint,
            &typed,
            &graph_text,
            tokenizer.vocabulary(),
        );
        Ok(Model {
            name: name.to_owned(),
            checkpoint,
            tokenizer,
            stop_tokens,
            graph_text,
            graph_name,
            config,
            typed,
            facts,
        })
    }
}

fn built_in_graph(model_type: Option<&str>, dir: &Path) -> Result<(String, String)> {
    let found = GRAPHS.iter().find(|(name, _, _)| Some(*name) == model_type);
    let Some((_, name, text)) = found else {
        let known: Vec<_> = GRAPHS.iter().map(|(name, _, _)| *name).collect();
        bail!(
            "{}: model_type is {}, and graphs for {} come with mirage-bench; give the operator graph with --graph FILE",
            dir.join("config.json").display(),
            model_type.map_or("not given".to_owned(), |name| format!("\"{name}\"")),
            known.join(" and ")
        );
    };
    Ok(((*name).to_owned(), (*text).to_owned()))
}

fn facts(
    name: &str,
    checkpoint: &Checkpoint,
    typed: &TypedGraph,
    graph: &str,
    tokens: usize,
) -> ModelFacts {
    let number = |key: &str| {
        checkpoint
            .config()
            .get(key)
            .and_then(serde_json::Value::as_u64)
    };
    let at = |context| typed.cost(Load { tokens: 1, context });
    ModelFacts {
        name: name.to_owned(),
        parameters: typed.parameters(),
        layers: typed.layers,
        vocabulary: number("vocab_size").map_or(tokens, |size| size as usize),
        context: number("max_position_embeddings").map_or(DEFAULT_CONTEXT, |size| size as usize),
        step_bytes: at(1).weight_bytes,
        // One more position in the cache.
        kv_bytes_per_position: at(3).cache_bytes.saturating_sub(at(2).cache_bytes),
        weights_hash: checkpoint.fingerprint().to_hex().to_string(),
        graph_hash: blake3::hash(graph.as_bytes()).to_hex().to_string(),
    }
}

/// The folder of a checkpoint that goes by `name`.
fn find(name: &str, caches: &[PathBuf]) -> Result<PathBuf> {
    let dir = Path::new(name);
    if dir.join("config.json").is_file() {
        return Ok(dir.to_path_buf());
    }
    if dir.exists() {
        bail!(
            "--model {name}: there is no config.json in it; give the folder of a checkpoint in the Hugging Face layout"
        );
    }
    let Some(repository) = repository(name) else {
        bail!(
            "--model {name}: there is no such folder; give a checkpoint's folder, or an id such as Qwen/Qwen3-0.6B"
        );
    };
    for cache in caches {
        if let Some(found) = snapshot(name, &cache.join(&repository))? {
            return Ok(found);
        }
    }
    let searched: Vec<_> = caches
        .iter()
        .map(|cache| cache.display().to_string())
        .collect();
    bail!(
        "--model {name}: it is neither a folder nor in the Hugging Face cache ({}).\n\
         To get it:           hf download {name}\n\
         To try without it:   mirage-bench --model models/tiny   (the small model in this repository)",
        if searched.is_empty() {
            "none found".to_owned()
        } else {
            searched.join(", ")
        }
    )
}

/// The cache folder's name of an id `owner/name`; `None` for what cannot be one.
fn repository(name: &str) -> Option<String> {
    let (owner, model) = name.split_once('/')?;
    (is_plain(owner) && is_plain(model)).then(|| format!("models--{owner}--{model}"))
}

/// Whether a text is one name of a folder, and none that is hidden or leads upwards.
fn is_plain(part: &str) -> bool {
    !part.is_empty()
        && !part.starts_with('.')
        && part
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

/// Where Hugging Face's tools keep models, by their rules.
fn hub_caches(variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let explicit = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE"));
    let home = variable("HF_HOME").map(|home| home.join("hub"));
    let xdg = variable("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub"));
    let user = variable("HOME").map(|home| home.join(".cache/huggingface/hub"));
    explicit.or(home).or(xdg).or(user).into_iter().collect()
}

/// The downloaded version of the cached repository of a model: the one that `refs/main` names, else the only one. A
/// version without a config.json is none.
///
/// # Errors
/// Several versions, none of which `refs/main` names.
fn snapshot(name: &str, repository: &Path) -> Result<Option<PathBuf>> {
    let snapshots = repository.join("snapshots");
    let main = read_text(&repository.join("refs/main"), MAX_REF).ok();
    let complete = |dir: &PathBuf| dir.join("config.json").is_file();
    let named = main
        .filter(|hash| is_plain(hash.trim()))
        .map(|hash| snapshots.join(hash.trim()))
        .filter(complete);
    if named.is_some() {
        return Ok(named);
    }
    let mut all: Vec<PathBuf> = std::fs::read_dir(&snapshots)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(complete)
        .collect();
    all.sort();
    if all.len() > 1 {
        let listed: Vec<_> = all
            .iter()
            .map(|dir| format!("  {}", dir.display()))
            .collect();
        bail!(
            "--model {name}: the Hugging Face cache has several versions, and {} names none of them; give the folder of one:\n{}",
            repository.join("refs/main").display(),
            listed.join("\n")
        );
    }
    Ok(all.pop())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_error(name: &str, caches: &[PathBuf], parts: &[&str]) {
        let error = find(name, caches).expect_err("no such model").to_string();
        for part in parts {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
    }

    #[test]
    fn what_is_missing_is_told_with_its_mend() {
        let dir = tempfile::tempdir().expect("a folder");
        check_error("no/such/folder", &[], &["no such folder"]);
        check_error(
            "Qwen/Qwen3-0.6B",
            &[],
            &[
                "hf download Qwen/Qwen3-0.6B",
                "--model models/tiny",
                "none found",
            ],
        );
        check_error(&dir.path().to_string_lossy(), &[], &["no config.json"]);
        check_error("../Qwen", &[], &["no such folder"]);
        let error = built_in_graph(Some("gpt2"), Path::new("x"))
            .expect_err("unknown")
            .to_string();
        assert!(
            error.contains("\"gpt2\"") && error.contains("--graph"),
            "{error}"
        );
    }

    #[test]
    fn the_cache_is_searched_by_id() {
        let cache = tempfile::tempdir().expect("a folder");
        let repository = cache.path().join("models--Qwen--Qwen3-0.6B");
        for (hash, complete) in [("aa", true), ("bb", true), ("cc", false)] {
            let snapshot = repository.join("snapshots").join(hash);
            std::fs::create_dir_all(&snapshot).expect("a folder");
            if complete {
                std::fs::write(snapshot.join("config.json"), "{}").expect("a file");
            }
        }
        let caches = [cache.path().to_path_buf()];
        let found = || find("Qwen/Qwen3-0.6B", &caches).expect("it is there");
        check_error(
            "Qwen/Qwen3-0.6B",
            &caches,
            &["several versions", "snapshots/aa", "snapshots/bb"],
        );
        std::fs::create_dir_all(repository.join("refs")).expect("a folder");
        let main = |hash: &str| {
            std::fs::write(repository.join("refs/main"), hash).expect("a file");
        };
        main("bb\n");
        assert!(found().ends_with("bb"));
        main("cc\n");
        check_error("Qwen/Qwen3-0.6B", &caches, &["several versions"]);
        std::fs::remove_dir_all(repository.join("snapshots/bb")).expect("removed");
        assert!(found().ends_with("aa"));
    }

    #[test]
    fn caches_follow_the_environment() {
        let caches = |variables: &[(&str, &str)]| {
            let variables: Vec<(String, PathBuf)> = variables
                .iter()
                .map(|(name, value)| ((*name).to_owned(), PathBuf::from(value)))
                .collect();
            hub_caches(move |name| {
                variables
                    .iter()
                    .find(|(known, _)| known == name)
                    .map(|(_, value)| value.clone())
            })
        };
        assert_eq!(
            caches(&[("HOME", "/h")]),
            [PathBuf::from("/h/.cache/huggingface/hub")]
        );
        assert_eq!(
            caches(&[("HOME", "/h"), ("HF_HOME", "/f")]),
            [PathBuf::from("/f/hub")]
        );
        assert_eq!(
            caches(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]),
            [PathBuf::from("/c")]
        );
        assert!(caches(&[]).is_empty());
    }
}
