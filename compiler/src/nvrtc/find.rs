//! Where libnvrtc is looked for, and in which order.
//!
//! Owns the list of places. It must not load anything (`ffi`), and it knows nothing
//! of what is compiled. Names are those of Linux, where CUDA GPUs are served.
//!
//! 1. `MIRAGE_NVRTC`: the library or its folder. If it is set, it is the only place.
//! 2. The active virtual environment (`VIRTUAL_ENV`).
//! 3. `.venv` in the current folder, in the project around it, and in the project
//!    around the executable (`target/release/mirage-compile`). A project is the
//!    nearest folder above with a `Cargo.lock`.
//! 4. The folders that `python3` imports from.
//! 5. `CUDA_HOME`, `CUDA_PATH`, `/usr/local/cuda`.
//! 6. The loader's path: `LD_LIBRARY_PATH`, ld.so.cache.
//!
//! Wheels come before the toolkit because a wheel in the project was put there for
//! this project, while a toolkit may be years old.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Major versions we accept, best first.
pub(super) const MAJORS: [u32; 2] = [13, 12];

/// A library found under the bare name may be older than these, or newer.
pub(super) const OLDEST_MAJOR: u32 = MAJORS[MAJORS.len() - 1];

/// Where NVIDIA's wheels put the library, below a folder that Python imports from:
/// `nvidia-cuda-nvrtc` (13.x), then `nvidia-cuda-nvrtc-cu12`.
const IN_WHEEL: [&str; 2] = ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"];

/// Where a toolkit has it.
const IN_TOOLKIT: [&str; 4] = [
    "lib64",
    "lib",
    "targets/x86_64-linux/lib",
    "targets/sbsa-linux/lib",
];

/// What the search depends on, apart from the file system.
#[derive(Clone, Debug, Default)]
pub(super) struct Surroundings {
    /// `MIRAGE_NVRTC`
    pub(super) mirage_nvrtc: Option<OsString>,
    /// `VIRTUAL_ENV`
    pub(super) virtual_env: Option<OsString>,
    /// `CUDA_HOME` and `CUDA_PATH`, those that are set, and the standard folder.
    pub(super) toolkits: Vec<PathBuf>,
    /// The current folder.
    pub(super) current_dir: Option<PathBuf>,
    /// This program.
    pub(super) executable: Option<PathBuf>,
}

impl Surroundings {
    /// Those of this process.
    pub(super) fn of_this_process() -> Surroundings {
        let set = |name| env::var_os(name).filter(|value| !value.is_empty());
        let toolkits = [
            set("CUDA_HOME"),
            set("CUDA_PATH"),
            Some("/usr/local/cuda".into()),
        ];
        Surroundings {
            mirage_nvrtc: set("MIRAGE_NVRTC"),
            virtual_env: set("VIRTUAL_ENV"),
            toolkits: toolkits.into_iter().flatten().map(PathBuf::from).collect(),
            current_dir: env::current_dir().ok(),
            executable: env::current_exe().ok(),
        }
    }
}

/// One kind of place.
pub(super) struct Step {
    /// How the error names it.
    pub(super) label: &'static str,
    /// The folders that this kind of place means here. May start a process, so it is
    /// asked only where the steps before found nothing.
    pub(super) folders: fn(&Surroundings) -> Vec<PathBuf>,
}

/// The places in order, without `MIRAGE_NVRTC` (which is final) and the loader's path
/// (which has no folders).
pub(super) const STEPS: [Step; 4] = [
    Step {
        label: "the active virtual environment (VIRTUAL_ENV)",
        folders: active_environment,
    },
    Step {
        label: ".venv of the current folder or project",
        folders: adjacent_environments,
    },
    Step {
        label: "the folders python3 imports from",
        folders: python_path,
    },
    Step {
        label: "the CUDA toolkit (CUDA_HOME, CUDA_PATH, /usr/local/cuda)",
        folders: toolkits,
    },
];

fn active_environment(around: &Surroundings) -> Vec<PathBuf> {
    around
        .virtual_env
        .iter()
        .flat_map(|folder| in_environment(Path::new(folder)))
        .collect()
}

fn adjacent_environments(around: &Surroundings) -> Vec<PathBuf> {
    let current = around.current_dir.as_deref();
    let homes = [
        current,
        current.and_then(project_of),
        around.executable.as_deref().and_then(project_of),
    ];
    let mut folders = Vec::new();
    for folder in homes
        .into_iter()
        .flatten()
        .flat_map(|home| in_environment(&home.join(".venv")))
    {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders
}

fn python_path(_: &Surroundings) -> Vec<PathBuf> {
    let asked = Command::new("python3")
        .args(["-c", "import sys; print('\\n'.join(sys.path))"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    // No python3, or one that fails: then no wheel of it can be used either.
    let Ok(answer) = asked else { return Vec::new() };
    let paths = String::from_utf8_lossy(&answer.stdout);
    paths
        .lines()
        .map(Path::new)
        .filter(|path| path.is_absolute())
        .flat_map(in_site_packages)
        .collect()
}

fn toolkits(around: &Surroundings) -> Vec<PathBuf> {
    around
        .toolkits
        .iter()
        .flat_map(|home| IN_TOOLKIT.iter().map(|below| home.join(below)))
        .collect()
}

/// The library folders of a virtual environment, or of a folder filled with
/// `pip install --target` (what `scripts/setup.sh` does where Python has no venv).
fn in_environment(environment: &Path) -> Vec<PathBuf> {
    let mut sites = Vec::new();
    for entry in fs::read_dir(environment.join("lib"))
        .into_iter()
        .flatten()
        .flatten()
    {
        if entry.file_name().to_string_lossy().starts_with("python") {
            sites.push(entry.path().join("site-packages"));
        }
    }
    sites.sort(); // read_dir's order is the file system's
    sites.push(environment.to_owned());
    sites
        .iter()
        .flat_map(|site| in_site_packages(site))
        .collect()
}

fn in_site_packages(site: &Path) -> Vec<PathBuf> {
    IN_WHEEL.iter().map(|below| site.join(below)).collect()
}

fn project_of(inside: &Path) -> Option<&Path> {
    inside
        .ancestors()
        .skip(1)
        .find(|folder| folder.join("Cargo.lock").is_file())
}

/// The best libnvrtc of a folder: `libnvrtc.so.13*`, then 12, then the bare name.
pub(super) fn library_in(folder: &Path) -> Option<PathBuf> {
    let rank = |name: &str| {
        let version = name.strip_prefix("libnvrtc.so")?;
        if version.is_empty() {
            return Some(MAJORS.len());
        }
        let major: u32 = version.strip_prefix('.')?.split('.').next()?.parse().ok()?;
        MAJORS.iter().position(|&accepted| accepted == major)
    };
    fs::read_dir(folder)
        .ok()?
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((rank(&name)?, name))
        })
        .min()
        .map(|(_, name)| folder.join(name))
}

/// The names to ask the loader for.
pub(super) fn loader_names() -> impl Iterator<Item = PathBuf> {
    MAJORS
        .iter()
        .map(|major| format!("libnvrtc.so.{major}").into())
        .chain(["libnvrtc.so".into()])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with these empty files.
    fn tree(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        root
    }

    #[track_caller]
    fn check_library(files: &[&str], expect: Option<&str>) {
        let root = tree(files);
        let found = library_in(root.path());
        assert_eq!(found, expect.map(|name| root.path().join(name)));
    }

    #[test]
    fn the_newest_accepted_library_of_a_folder_is_taken() {
        check_library(&[], None);
        check_library(
            &[
                "libnvrtc-builtins.so.13.0",
                "libnvrtc.alt.so.13",
                "libnvrtc.so.11.2",
            ],
            None,
        );
        check_library(
            &["libnvrtc.so.12", "libnvrtc.so.13"],
            Some("libnvrtc.so.13"),
        );
        check_library(
            &["libnvrtc.so", "libnvrtc.so.12.8.93"],
            Some("libnvrtc.so.12.8.93"),
        );
        check_library(&["libnvrtc.so"], Some("libnvrtc.so"));
    }

    #[test]
    fn a_venv_of_the_project_is_found_from_below_and_from_the_executable() {
        let root = tree(&[
            "Cargo.lock",
            "compiler/src/lib.rs",
            "target/release/mirage-compile",
            ".venv/lib/python3.11/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
        ]);
        let library = root
            .path()
            .join(".venv/lib/python3.11/site-packages/nvidia/cu13/lib/libnvrtc.so.13");
        let inside = Surroundings {
            current_dir: Some(root.path().join("compiler/src")),
            ..Default::default()
        };
        let built = Surroundings {
            current_dir: Some("/".into()),
            executable: Some(root.path().join("target/release/mirage-compile")),
            ..Default::default()
        };
        for around in [inside, built] {
            let found: Vec<_> = adjacent_environments(&around)
                .iter()
                .filter_map(|folder| library_in(folder))
                .collect();
            assert_eq!(found, std::slice::from_ref(&library));
        }
    }

    #[test]
    fn a_folder_filled_by_pip_target_counts_as_an_environment() {
        let root = tree(&["env/nvidia/cuda_nvrtc/lib/libnvrtc.so.12"]);
        let around = Surroundings {
            virtual_env: Some(root.path().join("env").into()),
            ..Default::default()
        };
        let found: Vec<_> = active_environment(&around)
            .iter()
            .filter_map(|folder| library_in(folder))
            .collect();
        assert_eq!(
            found,
            [root.path().join("env/nvidia/cuda_nvrtc/lib/libnvrtc.so.12")]
        );
    }
}
