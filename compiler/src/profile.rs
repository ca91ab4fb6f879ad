//! Profiles: what the parts of one GPU were measured to cost, as a file.
//!
//! Owns the format (RON), how it is read and written, and the profile that is built in. What the constants mean in a
//! prediction is the cost model's business; measuring them is `mirage-calibrate`'s.

use serde::{Deserialize, Serialize};

use crate::arch::{DeviceFacts, GpuModel};
use crate::cost::Machine;

/// The profile that ships with us; other GPUs are derived from it.
const H100: &str = include_str!("../../profiles/h100.ron");

/// A GPU that was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The name its driver gives.
    pub gpu: String,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Largest shared memory of one block with opt-in, in bytes.
    pub smem_per_block_optin: u32,
    /// L2 cache, in bytes.
    pub l2_bytes: u64,
    /// When the constants were measured, and with what.
    pub measured: String,
    /// The constants.
    pub machine: Machine,
}

/// A profile that cannot be used, and the mend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// The text is no profile.
    #[error(
        "{place}: {reason}\nhelp: a profile is a file that mirage-calibrate wrote; write it again"
    )]
    Text {
        /// File, line and column.
        place: String,
        /// What is wrong there.
        reason: String,
    },
    /// It was measured on a GPU that is no match for the one at hand.
    #[error(
        "the profile is of {profile}, and does not hold for {gpu}\nhelp: measure this GPU with mirage-calibrate, or leave --profile out"
    )]
    OtherGpu {
        /// The profile's GPU.
        profile: String,
        /// The GPU at hand.
        gpu: String,
    },
    /// No cubin of ours runs on its GPU.
    #[error(transparent)]
    Unsupported(#[from] crate::arch::UnsupportedDevice),
}

impl Profile {
    /// Reads a profile. `file_name` is what errors call it; nothing is opened.
    ///
    /// # Errors
    ///
    /// [`ProfileError::Text`], with the place.
    pub fn parse(text: &str, file_name: &str) -> Result<Profile, ProfileError> {
        let profile: Profile = ron::from_str(text).map_err(|error| ProfileError::Text {
            place: format!("{file_name}:{}", error.span.start),
            reason: error.code.to_string(),
        })?;
        match profile.machine.first_unusable() {
            Some(name) => Err(ProfileError::Text {
                place: file_name.to_owned(),
                reason: format!("`{name}` must be a number above zero"),
            }),
            None => Ok(profile),
        }
    }

    /// The H100 that all constants were first measured on.
    pub fn h100() -> Profile {
        // The text is part of the program, and a test reads it.
        Profile::parse(H100, "profiles/h100.ron")
            .expect("the profile that is built in is well-formed")
    }

    /// The GPU it is of, to plan for.
    ///
    /// # Errors
    ///
    /// [`ProfileError::Unsupported`] where no cubin of ours runs on it.
    pub fn gpu_model(&self) -> Result<GpuModel, ProfileError> {
        let gpu = GpuModel::of_device(&DeviceFacts {
            name: &self.gpu,
            compute_capability: self.compute_capability,
            sms: self.sms,
            smem_per_block_optin: self.smem_per_block_optin,
            l2_bytes: self.l2_bytes,
        })?;
        Ok(gpu.with_machine(self.machine))
    }

    /// The GPU at hand with these constants.
    ///
    /// # Errors
    ///
    /// [`ProfileError::OtherGpu`] where the profile is of another kind of GPU.
    pub fn apply(&self, gpu: GpuModel) -> Result<GpuModel, ProfileError> {
        let of = self.gpu_model()?;
        if (of.name, of.arch, of.sms) == (gpu.name, gpu.arch, gpu.sms) {
            return Ok(gpu.with_machine(self.machine));
        }
        let words = |gpu: &GpuModel| format!("{} ({}, {} SMs)", gpu.name, gpu.arch, gpu.sms);
        Err(ProfileError::OtherGpu {
            profile: words(&of),
            gpu: words(&gpu),
        })
    }

    /// The file's text; reading it gives the same profile.
    pub fn to_ron(&self) -> String {
        let style = ron::ser::PrettyConfig::new().depth_limit(4);
        // Strings, numbers and structures of these: nothing that RON cannot write.
        let body = ron::ser::to_string_pretty(self, style).expect("a profile is plain data");
        format!(
            "// What the parts of one GPU cost, written by mirage-calibrate. Times are in microseconds, rates in GB/s;\n\
             // compiler/src/cost.rs says what each constant is of.\n{body}\n"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Arch;

    #[test]
    fn what_is_written_reads_the_same() {
        let profile = Profile::h100();
        assert_eq!(Profile::parse(&profile.to_ron(), "x.ron"), Ok(profile));
    }

    #[test]
    fn the_built_in_profile_is_of_the_default_gpu() {
        let gpu = Profile::h100().gpu_model().unwrap();
        let known = GpuModel::default_for(Arch::Sm90a);
        assert_eq!(
            GpuModel {
                machine: None,
                ..gpu
            },
            known
        );
        assert_eq!(Machine::of(&gpu), Machine::of(&known));
    }

    #[track_caller]
    fn check_bad(from: &str, to: &str, expect: &str) {
        assert!(H100.contains(from), "{from}");
        let error = Profile::parse(&H100.replacen(from, to, 1), "x.ron").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(expect) && text.starts_with("x.ron:"),
            "{text}"
        );
        assert!(text.contains("\nhelp: "), "{text}");
    }

    #[test]
    fn bad_files_are_one_clear_error() {
        check_bad("sms: 132", "sms: many", "Expected integer");
        check_bad("sms: 132", "cores: 132", "Unexpected field named `cores`");
        check_bad("barrier: 2.63", "barrier: -1.0", "`barrier` must be");
        check_bad("barrier: 2.63", "barrier: NaN", "`barrier` must be");
        check_bad("barrier: 2.63,", "", "missing field named `barrier`");
    }

    #[test]
    fn a_profile_is_for_its_own_kind_of_gpu() {
        let profile = Profile::h100();
        let mut machine = profile.machine;
        machine.stream.gbps = 3000.0;
        let other = Profile { machine, ..profile };
        let gpu = other.apply(GpuModel::default_for(Arch::Sm90a)).unwrap();
        assert_eq!((gpu.hbm_gbps, Machine::of(&gpu)), (3000.0, machine));
        let error = other.apply(GpuModel::default_for(Arch::Sm80)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("of H100 SXM (sm_90a, 132 SMs)"), "{text}");
        assert!(text.contains("hold for A100 SXM 80GB"), "{text}");
    }
}
