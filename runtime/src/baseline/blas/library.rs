//! Finds and loads cuBLASLt, so that the bindings find it loaded.
//!
//! The bindings open the library by its bare name. One in a Python wheel or a toolkit is not on the loader's path, but
//! once a library of that name is loaded, from wherever, the loader takes it for the bare name too.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use cudarc::cublaslt::sys;

use crate::baseline::BaselineError;

/// Names of the library, best first.
const NAMES: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];

/// Where NVIDIA's wheels have it, below a folder that Python imports from.
const IN_WHEEL: [&str; 2] = ["nvidia/cu13/lib", "nvidia/cublas/lib"];

/// Where a toolkit has it.
const IN_TOOLKIT: [&str; 3] = ["lib64", "lib", "targets/x86_64-linux/lib"];

/// Loads the library, once. In this order: `MIRAGE_CUBLASLT` (the library or its folder; if set, the only place), wheels
/// of the active virtual environment, of `.venv` in the current folder and of `python3`, the CUDA toolkit, the loader's
/// path.
///
/// # Errors
/// [`BaselineError::NoBlas`] with all places.
pub(super) fn load() -> Result<(), BaselineError> {
    static LOADED: OnceLock<Result<(), Vec<String>>> = OnceLock::new();
    LOADED
        .get_or_init(search)
        .clone()
        .map_err(|looked| BaselineError::NoBlas { looked })
}

fn search() -> Result<(), Vec<String>> {
    let set = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let mut looked = Vec::new();
    if let Some(chosen) = set("MIRAGE_CUBLASLT") {
        let label = "MIRAGE_CUBLASLT";
        let found = if chosen.is_dir() {
            from_folder(&chosen, label, &mut looked)
        } else {
            open(&chosen, label, &mut looked)
        };
        return if found { Ok(()) } else { Err(looked) };
    }
    let environments = [set("VIRTUAL_ENV"), Some(PathBuf::from(".venv"))];
    let wheels = environments
        .iter()
        .flatten()
        .flat_map(|home| site_packages(home))
        .chain(python_path());
    let in_wheels = wheels.flat_map(|folder| IN_WHEEL.map(|below| folder.join(below)));
    let toolkits = [
        set("CUDA_HOME"),
        set("CUDA_PATH"),
        Some(PathBuf::from("/usr/local/cuda")),
    ];
    let in_toolkits = toolkits
        .iter()
        .flatten()
        .flat_map(|home| IN_TOOLKIT.map(|below| home.join(below)));
    let folders: Vec<PathBuf> = in_wheels.chain(in_toolkits).collect();
    for folder in folders {
        if from_folder(&folder, "found", &mut looked) {
            return Ok(());
        }
    }
    // SAFETY: only opens and closes the library.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    looked.push("no wheel in VIRTUAL_ENV, .venv or python3's folders that loads".to_owned());
    looked.push("no toolkit in CUDA_HOME, CUDA_PATH or /usr/local/cuda that loads".to_owned());
    looked.push("nothing on the loader's path".to_owned());
    Err(looked)
}

/// Loads the library from `folder`, if it is there.
fn from_folder(folder: &Path, label: &str, looked: &mut Vec<String>) -> bool {
    let library = NAMES
        .iter()
        .map(|name| folder.join(name))
        .find(|library| library.is_file());
    library.is_some_and(|library| open(&library, label, looked))
}

fn open(library: &Path, label: &str, looked: &mut Vec<String>) -> bool {
    // SAFETY: NVIDIA's library, whose initialisers are safe to run.
    match unsafe { libloading::Library::new(library) } {
        Ok(loaded) => {
            // Stays for the life of the process, as the bindings' own handle does.
            std::mem::forget(loaded);
            // SAFETY: only opens and closes the library.
            let usable = unsafe { sys::is_culib_present() };
            if !usable {
                looked.push(format!(
                    "{label}: {} is not named as the loader knows it",
                    library.display()
                ));
            }
            usable
        }
        Err(error) => {
            looked.push(format!("{label}: {error}"));
            false
        }
    }
}

/// The folders of packages in a virtual environment.
fn site_packages(environment: &Path) -> Vec<PathBuf> {
    let Ok(versions) = environment.join("lib").read_dir() else {
        return Vec::new();
    };
    let mut folders: Vec<_> = versions
        .flatten()
        .map(|version| version.path().join("site-packages"))
        .collect();
    folders.retain(|folder| folder.is_dir());
    folders.sort();
    folders
}

/// The folders that `python3` imports from.
fn python_path() -> Vec<PathBuf> {
    let print = ["-c", "import sys; print('\\n'.join(sys.path))"];
    let asked = Command::new("python3")
        .args(print)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    // No python3, or one that fails: then no wheel of it can be used either.
    let Ok(answer) = asked else { return Vec::new() };
    String::from_utf8_lossy(&answer.stdout)
        .lines()
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .collect()
}
