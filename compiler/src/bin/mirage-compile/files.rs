//! The files that a run reads and writes, and what to say where it cannot.
//!
//! An output folder with a manifest is complete: an old manifest and cubin are removed before the new source is written,
//! and the new manifest comes last.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use mirage_compiler::arch::GpuModel;
use mirage_compiler::artifact::{Artifact, CUBIN_FILE, MANIFEST_FILE, SOURCE_FILE};
use mirage_compiler::driver::{Compilation, CompileError};
use mirage_compiler::input::{MAX_TEXT, read_text};
use mirage_compiler::profile::Profile;
use mirage_compiler::typed::ModelConfig;

use crate::Failure;

/// Names of the stages' dumps, in the order of the stages.
pub(crate) const DUMPS: [&str; 5] = ["graph", "typed", "fused", "plan", "program"];

/// The graph's text.
pub(crate) fn read_graph(path: &Path) -> Result<String, Failure> {
    read_text(path, MAX_TEXT).map_err(|reason| {
        let mut message = format!("the graph {} cannot be read: {reason}", path.display());
        let others = graphs_beside(path);
        if !others.is_empty() {
            // Writing to a String cannot fail.
            let _ = write!(message, "; in that folder there is {}", others.join(", "));
        }
        Failure::Files(message)
    })
}

/// The checkpoint's config.json; none where no checkpoint was named.
pub(crate) fn read_config(model: Option<&Path>) -> Result<ModelConfig, Failure> {
    let Some(folder) = model else {
        return Ok(ModelConfig::none());
    };
    let path = folder.join("config.json");
    let text = read_text(&path, MAX_TEXT).map_err(|reason| {
        Failure::Files(format!(
            "{} cannot be read: {reason}; --model takes a checkpoint's folder in the Hugging Face layout",
            path.display()
        ))
    })?;
    Ok(ModelConfig::parse(&text, &path.to_string_lossy()).map_err(CompileError::from)?)
}

/// The GPU that a profile is of.
pub(crate) fn read_profile(path: &Path) -> Result<GpuModel, Failure> {
    let text = read_text(path, MAX_TEXT).map_err(|reason| {
        Failure::Files(format!(
            "{} cannot be read: {reason}; --profile takes a file that mirage-calibrate wrote",
            path.display()
        ))
    })?;
    Profile::parse(&text, &path.to_string_lossy())
        .and_then(|profile| profile.gpu_model())
        .map_err(|error| Failure::Files(error.to_string()))
}

/// The graph files of the folder that a mistyped path names, sorted.
fn graphs_beside(path: &Path) -> Vec<String> {
    let folder = if path.is_dir() {
        Some(path)
    } else {
        path.parent()
    };
    // The parent of a bare file name is the empty path, which read_dir does not take.
    let folder = folder.map(|folder| {
        if folder.as_os_str().is_empty() {
            Path::new(".")
        } else {
            folder
        }
    });
    let entries = folder
        .and_then(|folder| fs::read_dir(folder).ok())
        .into_iter()
        .flatten()
        .flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|other| other != path && other.extension().is_some_and(|e| e == "ron"))
        .filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .collect();
    names.sort();
    names
}

/// Writes the CUDA source and the stages' dumps into the folder, which is made if it is not there.
pub(crate) fn write_source(folder: &Path, compilation: &Compilation) -> Result<(), Failure> {
    fs::create_dir_all(folder).map_err(|error| unwritable(folder, &error))?;
    for old in [MANIFEST_FILE, CUBIN_FILE] {
        let path = folder.join(old);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(unwritable(&path, &error));
            }
            _ => {}
        }
    }
    let stages: [&dyn std::fmt::Display; DUMPS.len()] = [
        &compilation.graph,
        &compilation.typed,
        &compilation.fused,
        &compilation.plan,
        &compilation.program,
    ];
    for (name, stage) in DUMPS.iter().zip(stages) {
        write(folder, &format!("{name}.txt"), stage.to_string().as_bytes())?;
    }
    write(folder, SOURCE_FILE, compilation.source.text.as_bytes())?;
    for (name, text) in &compilation.source.headers {
        write(folder, name, text.as_bytes())?;
    }
    Ok(())
}

/// Writes the cubin, then its manifest.
pub(crate) fn write_artifact(folder: &Path, artifact: &Artifact) -> Result<(), Failure> {
    write(folder, CUBIN_FILE, &artifact.cubin)?;
    let manifest = artifact.manifest.to_json();
    write(folder, MANIFEST_FILE, manifest.as_bytes())
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), Failure> {
    let path = folder.join(name);
    fs::write(&path, bytes).map_err(|error| unwritable(&path, &error))
}

fn unwritable(path: &Path, error: &io::Error) -> Failure {
    Failure::Files(format!(
        "{} cannot be written: {error}; -o takes a folder that you can write to",
        path.display()
    ))
}
