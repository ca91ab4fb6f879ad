//! GPU architectures we compile for and the GPUs we know, as data.
//!
//! Owns the list of architectures, how their names are read, and the table of
//! GPUs with the sizes the planner and the cost model start from. It must not
//! hold behaviour that differs per GPU: device code differs in
//! `device/arch/*.cuh`, and everything else reads these numbers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::cost::Machine;

/// A GPU architecture as NVRTC names it (`sm_90a`).
///
/// The `a` targets hold the instructions of exactly one generation
/// (`setmaxnreg`, and everything of Blackwell's that we may use later); their
/// cubins do not run on any other generation, which is fine for a cubin that is
/// compiled where it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Arch {
    /// Ampere, data centre (A100).
    #[serde(rename = "sm_80")]
    Sm80,
    /// Ampere, consumer and workstation (RTX 3090, A40).
    #[serde(rename = "sm_86")]
    Sm86,
    /// Ada (RTX 4090, L40S).
    #[serde(rename = "sm_89")]
    Sm89,
    /// Hopper (H100, H200).
    #[serde(rename = "sm_90a")]
    Sm90a,
    /// Blackwell, data centre (B200).
    #[serde(rename = "sm_100a")]
    Sm100a,
    /// Blackwell, consumer and workstation (RTX 5090).
    #[serde(rename = "sm_120a")]
    Sm120a,
}

impl Arch {
    /// Every architecture, oldest first.
    pub const ALL: [Arch; 6] = [
        Arch::Sm80,
        Arch::Sm86,
        Arch::Sm89,
        Arch::Sm90a,
        Arch::Sm100a,
        Arch::Sm120a,
    ];

    /// The name NVRTC takes, e.g. `sm_90a`.
    pub const fn name(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm86 => "sm_86",
            Arch::Sm89 => "sm_89",
            Arch::Sm90a => "sm_90a",
            Arch::Sm100a => "sm_100a",
            Arch::Sm120a => "sm_120a",
        }
    }

    /// Compute capability times ten (90 for `sm_90a`), as NVRTC lists it and as
    /// `__CUDA_ARCH__ / 10` reads in device code.
    pub const fn capability(self) -> u32 {
        match self {
            Arch::Sm80 => 80,
            Arch::Sm86 => 86,
            Arch::Sm89 => 89,
            Arch::Sm90a => 90,
            Arch::Sm100a => 100,
            Arch::Sm120a => 120,
        }
    }

    /// The architecture whose cubin runs on a device of this compute capability.
    ///
    /// `None` where no cubin of ours does (older than 8.0, or a generation we do
    /// not know).
    pub fn for_device(major: u32, minor: u32) -> Option<Arch> {
        Arch::ALL
            .into_iter()
            .find(|arch| arch.capability() == major * 10 + minor)
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Arch {
    type Err = UnknownArch;

    fn from_str(given: &str) -> Result<Arch, UnknownArch> {
        Arch::ALL
            .into_iter()
            .find(|arch| arch.name() == given)
            .ok_or_else(|| UnknownArch {
                given: given.to_owned(),
                meant: closest(given),
            })
    }
}

/// The architecture that a mistyped name most likely meant: one with the same
/// number (`sm_90`, `90a`, `SM90`), else the nearest in spelling.
fn closest(given: &str) -> Option<Arch> {
    let digits: String = given.chars().filter(char::is_ascii_digit).collect();
    let same_number = Arch::ALL
        .into_iter()
        .find(|arch| arch.capability().to_string() == digits);
    same_number.or_else(|| {
        Arch::ALL
            .into_iter()
            .map(|arch| (strsim::damerau_levenshtein(arch.name(), given), arch))
            .filter(|&(distance, _)| distance <= 2)
            // What was cut short comes before what was mistyped.
            .min_by_key(|&(distance, arch)| (!arch.name().starts_with(given), distance))
            .map(|(_, arch)| arch)
    })
}

/// An architecture name that we have no target for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct UnknownArch {
    /// What was asked for.
    pub given: String,
    /// The closest name that we know.
    pub meant: Option<Arch>,
}

impl fmt::Display for UnknownArch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "unknown GPU architecture \"{}\"",
            self.given.escape_debug()
        )?;
        if let Some(meant) = self.meant {
            write!(f, ", did you mean \"{meant}\"?")?;
        }
        let known: Vec<_> = Arch::ALL.iter().map(|arch| arch.name()).collect();
        write!(f, " (known: {})", known.join(", "))
    }
}

/// Where a number of [`GpuModel`] comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Provenance {
    /// We timed it, as a plain streaming read of memory larger than the L2.
    Measured,
    /// The vendor's data sheet: a peak that no kernel quite reaches.
    Datasheet,
}

/// A GPU as numbers: what the planner needs before it has seen the device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct GpuModel {
    /// The name people use.
    pub name: &'static str,
    /// The architecture its cubins are compiled for.
    pub arch: Arch,
    /// Streaming multiprocessors: the mesh's size.
    pub sms: u32,
    /// Largest dynamic shared memory that one block can opt in to, in bytes
    /// (CUDA C++ Programming Guide, "Technical Specifications per Compute
    /// Capability": 1 KB less than the SM holds).
    pub smem_per_block_optin: u32,
    /// L2 cache, in bytes.
    pub l2_bytes: u64,
    /// Device memory bandwidth for reads, in 10^9 bytes per second.
    pub hbm_gbps: f64,
    /// Where `hbm_gbps` comes from.
    pub hbm_source: Provenance,
    /// What its parts cost, where a profile of it was read; else it is derived from the H100's.
    pub machine: Option<Machine>,
}

const KIB: u32 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The GPUs we know. The first of an architecture is its default.
pub const GPU_MODELS: &[GpuModel] = &[
    GpuModel {
        name: "A100 SXM 80GB",
        arch: Arch::Sm80,
        sms: 108,
        smem_per_block_optin: 163 * KIB,
        l2_bytes: 40 * MIB,
        hbm_gbps: 2039.0,
        hbm_source: Provenance::Datasheet,
        machine: None,
    },
    GpuModel {
        name: "RTX 3090",
        arch: Arch::Sm86,
        sms: 82,
        smem_per_block_optin: 99 * KIB,
        l2_bytes: 6 * MIB,
        hbm_gbps: 936.0,
        hbm_source: Provenance::Datasheet,
        machine: None,
    },
    GpuModel {
        name: "RTX 4090",
        arch: Arch::Sm89,
        sms: 128,
        smem_per_block_optin: 99 * KIB,
        l2_bytes: 72 * MIB,
        hbm_gbps: 1008.0,
        hbm_source: Provenance::Datasheet,
        machine: None,
    },
    GpuModel {
        name: "H100 SXM",
        arch: Arch::Sm90a,
        sms: 132,
        smem_per_block_optin: 227 * KIB,
        l2_bytes: 50 * MIB,
        // The data sheet says 3350.
        hbm_gbps: 3060.0,
        hbm_source: Provenance::Measured,
        machine: None,
    },
    GpuModel {
        name: "H200 SXM",
        arch: Arch::Sm90a,
        sms: 132,
        smem_per_block_optin: 227 * KIB,
        l2_bytes: 50 * MIB,
        hbm_gbps: 4800.0,
        hbm_source: Provenance::Datasheet,
        machine: None,
    },
    GpuModel {
        name: "B200",
        arch: Arch::Sm100a,
        sms: 148,
        smem_per_block_optin: 227 * KIB,
        l2_bytes: 126 * MIB,
        hbm_gbps: 8000.0,
        hbm_source: Provenance::Datasheet,
        machine: None,
    },
    GpuModel {
        name: "RTX 5090",
        arch: Arch::Sm120a,
        sms: 170,
        smem_per_block_optin: 99 * KIB,
        l2_bytes: 96 * MIB,
        hbm_gbps: 1792.0,
        hbm_source: Provenance::Datasheet,
        machine: None,
    },
];

impl GpuModel {
    /// The mesh that the CPU executor runs a program on: a made-up GPU of few SMs, so that little time goes into
    /// exchanges and every usual core count has CTAs to work on. It is the same on every machine, so that a program
    /// computes the same everywhere. Sizes other than the SMs are the H100's; nothing is emitted for it.
    pub fn cpu() -> GpuModel {
        GpuModel {
            name: "CPU",
            sms: 8,
            ..GpuModel::default_for(Arch::Sm90a)
        }
    }

    /// The same GPU with constants measured on it.
    pub fn with_machine(self, machine: Machine) -> GpuModel {
        GpuModel {
            hbm_gbps: machine.stream.gbps,
            hbm_source: Provenance::Measured,
            machine: Some(machine),
            ..self
        }
    }

    /// The GPU we plan for where an architecture is named and no device is at hand.
    pub fn default_for(arch: Arch) -> GpuModel {
        let index = match arch {
            Arch::Sm80 => 0,
            Arch::Sm86 => 1,
            Arch::Sm89 => 2,
            Arch::Sm90a => 3,
            Arch::Sm100a => 5,
            Arch::Sm120a => 6,
        };
        GPU_MODELS[index]
    }

    /// The GPU at hand: what its driver says, and for the rest the GPU of its architecture whose name the device's name
    /// holds (`NVIDIA H200 NVL` is planned as an H200), else the architecture's default.
    ///
    /// # Errors
    ///
    /// [`UnsupportedDevice`] where no cubin of ours runs on it.
    pub fn of_device(device: &DeviceFacts<'_>) -> Result<GpuModel, UnsupportedDevice> {
        let (major, minor) = device.compute_capability;
        let arch = Arch::for_device(major, minor).ok_or_else(|| UnsupportedDevice {
            name: device.name.to_owned(),
            compute_capability: device.compute_capability,
        })?;
        // "H200 SXM" is called H200, "RTX 4090" is called RTX 4090: the form factor is no part of the device's name.
        let called = |gpu: &&GpuModel| {
            let (name, _) = gpu.name.split_once(" SXM").unwrap_or((gpu.name, ""));
            device.name.contains(name)
        };
        let known = GPU_MODELS
            .iter()
            .filter(|gpu| gpu.arch == arch)
            .find(called);
        Ok(GpuModel {
            sms: device.sms,
            smem_per_block_optin: device.smem_per_block_optin,
            l2_bytes: device.l2_bytes,
            ..known
                .copied()
                .unwrap_or_else(|| GpuModel::default_for(arch))
        })
    }
}

/// What a driver says about a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFacts<'a> {
    /// Marketing name, `NVIDIA H100 80GB HBM3`.
    pub name: &'a str,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors that there are for us: fewer than the GPU has in a MIG instance.
    pub sms: u32,
    /// Largest shared memory of one block with opt-in, in bytes.
    pub smem_per_block_optin: u32,
    /// L2 cache, in bytes.
    pub l2_bytes: u64,
}

/// A device that no cubin of ours runs on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name} has compute capability {}.{}, which mirage does not compile for (it does for {})",
    .compute_capability.0,
    .compute_capability.1,
    Arch::ALL.map(|arch| format!("{}.{}", arch.capability() / 10, arch.capability() % 10)).join(", ")
)]
pub struct UnsupportedDevice {
    /// Its name.
    pub name: String,
    /// Its compute capability, major and minor.
    pub compute_capability: (u32, u32),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(given: &str, expect: Result<Arch, &str>) {
        assert_eq!(
            given.parse::<Arch>().map_err(|error| error.to_string()),
            expect.map_err(str::to_owned)
        );
    }

    #[test]
    fn names_round_trip() {
        for arch in Arch::ALL {
            check(arch.name(), Ok(arch));
            let json = serde_json::to_string(&arch).unwrap();
            assert_eq!(json, format!("\"{arch}\""));
            assert_eq!(serde_json::from_str::<Arch>(&json).unwrap(), arch);
            assert_eq!(
                Arch::for_device(arch.capability() / 10, arch.capability() % 10),
                Some(arch)
            );
        }
        assert_eq!(Arch::for_device(7, 5), None);
    }

    #[test]
    fn unknown_names_are_explained() {
        let known = "(known: sm_80, sm_86, sm_89, sm_90a, sm_100a, sm_120a)";
        let meant = |given: &str, arch: &str| {
            format!("unknown GPU architecture \"{given}\", did you mean \"{arch}\"? {known}")
        };
        check("sm_90", Err(&meant("sm_90", "sm_90a")));
        check("90a", Err(&meant("90a", "sm_90a")));
        check("SM_80", Err(&meant("SM_80", "sm_80")));
        check("sm_99", Err(&meant("sm_99", "sm_89")));
        check(
            "hopper",
            Err(&format!("unknown GPU architecture \"hopper\" {known}")),
        );
        check("", Err(&format!("unknown GPU architecture \"\" {known}")));
    }

    #[test]
    fn a_device_is_planned_as_what_it_is() {
        let device = |name, compute_capability| DeviceFacts {
            name,
            compute_capability,
            sms: 114,
            smem_per_block_optin: 100_000,
            l2_bytes: 1 << 20,
        };
        let check = |name, capability, expect: &str, gbps: f64| {
            let gpu = GpuModel::of_device(&device(name, capability)).unwrap();
            assert_eq!((gpu.name, gpu.hbm_gbps), (expect, gbps));
            assert_eq!(
                (gpu.sms, gpu.smem_per_block_optin, gpu.l2_bytes),
                (114, 100_000, 1 << 20)
            );
        };
        check("NVIDIA H100 80GB HBM3", (9, 0), "H100 SXM", 3060.0);
        check("NVIDIA H200", (9, 0), "H200 SXM", 4800.0);
        check("NVIDIA A100-SXM4-80GB", (8, 0), "A100 SXM 80GB", 2039.0);
        check("NVIDIA L40S", (8, 9), "RTX 4090", 1008.0);
        let old = GpuModel::of_device(&device("Tesla T4", (7, 5))).unwrap_err();
        assert_eq!(
            old.to_string(),
            "Tesla T4 has compute capability 7.5, which mirage does not compile for \
             (it does for 8.0, 8.6, 8.9, 9.0, 10.0, 12.0)"
        );
    }

    #[test]
    fn each_arch_has_its_first_gpu_as_default() {
        for arch in Arch::ALL {
            let first = GPU_MODELS.iter().find(|gpu| gpu.arch == arch).unwrap();
            assert_eq!(&GpuModel::default_for(arch), first);
        }
    }
}
