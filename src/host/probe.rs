//! Which KVM is here.
//!
//! A `/dev/kvm` that opens is not enough: in some containers and clouds the module behind it is KVM in software, on
//! processors that show neither SVM nor VMX. It answers every ioctl, and stock kernels do not boot under it. Such a
//! host is named here and never tried.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

/// The KVM device.
const DEVICE: &str = "/dev/kvm";

/// The KVM API version that every kernel since 2.6.22 has (Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;

/// The capabilities that the monitor cannot do without, by their name and number in include/uapi/linux/kvm.h.
const REQUIRED: [(&str, u64); 17] = [
    ("KVM_CAP_IRQCHIP", 0),
    ("KVM_CAP_USER_MEMORY", 3),
    ("KVM_CAP_SET_TSS_ADDR", 4),
    ("KVM_CAP_EXT_CPUID", 7),
    ("KVM_CAP_MP_STATE", 14),
    ("KVM_CAP_SYNC_MMU", 16),
    ("KVM_CAP_SET_GUEST_DEBUG", 23),
    ("KVM_CAP_IRQFD", 32),
    ("KVM_CAP_IOEVENTFD", 36),
    ("KVM_CAP_SET_IDENTITY_MAP_ADDR", 37),
    ("KVM_CAP_VCPU_EVENTS", 41),
    ("KVM_CAP_XCRS", 56),
    ("KVM_CAP_READONLY_MEM", 81),
    ("KVM_CAP_IMMEDIATE_EXIT", 136),
    ("KVM_CAP_X86_USER_SPACE_MSR", 188),
    ("KVM_CAP_X86_MSR_FILTER", 189),
    ("KVM_CAP_XSAVE", 55),
];

/// What was found where KVM should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kvm {
    /// It runs stock kernels.
    Usable {
        /// `svm` or `vmx`.
        extension: &'static str,
    },
    /// There is no `/dev/kvm`.
    NoDevice,
    /// `/dev/kvm` may not be opened by this user.
    NotPermitted,
    /// `/dev/kvm` opens, and the processor has neither SVM nor VMX.
    Software,
    /// Real KVM that lacks something that the monitor needs.
    Lacking(Vec<&'static str>),
    /// `/dev/kvm` is there and does not work; the words say how.
    Broken(String),
}

impl Kvm {
    /// Whether machines can run on it.
    pub fn usable(&self) -> bool {
        matches!(self, Kvm::Usable { .. })
    }

    /// What would make it usable, if anything would.
    pub fn remedy(&self) -> Option<&'static str> {
        match self {
            Kvm::Usable { .. } => None,
            Kvm::NoDevice => Some(
                "load kvm_amd or kvm_intel, switch on virtualization in the firmware, or pass the device into this \
                 container; the software KVM host (--host nested) needs none",
            ),
            Kvm::NotPermitted => Some(
                "add this user to the group that owns /dev/kvm (often `kvm`); the software KVM host (--host nested) needs none",
            ),
            Kvm::Software => Some(
                "use a host with nested virtualization; the software KVM host (--host nested) needs none",
            ),
            Kvm::Lacking(_) => {
                Some("a host kernel from 5.10 on; the software KVM host (--host nested) needs none")
            }
            Kvm::Broken(_) => {
                Some("see the kernel log of this host; the software KVM host (--host nested) needs none")
            }
        }
    }
}

impl std::fmt::Display for Kvm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Kvm::Usable { extension } => write!(f, "/dev/kvm works ({extension})"),
            Kvm::NoDevice => write!(f, "There is no /dev/kvm"),
            Kvm::NotPermitted => write!(f, "This user may not open /dev/kvm"),
            Kvm::Software => write!(
                f,
                "/dev/kvm opens, but the processor shows neither svm nor vmx: KVM in software, which cannot run \
                 stock kernels"
            ),
            Kvm::Lacking(missing) => write!(f, "/dev/kvm lacks {}", missing.join(", ")),
            Kvm::Broken(how) => write!(f, "/dev/kvm does not work: {how}"),
        }
    }
}

/// Looks at this host.
pub fn kvm() -> Kvm {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    classify(open(Path::new(DEVICE)), extension(&flags))
}

/// What the device itself told: the numbers of the capabilities that it lacks.
fn open(device: &Path) -> Result<Vec<&'static str>, Kvm> {
    // An ordinary open first: its error says more than the wrapper's.
    match fs::OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => {}
        Err(error) => {
            return Err(match error.kind() {
                ErrorKind::NotFound => Kvm::NoDevice,
                ErrorKind::PermissionDenied => Kvm::NotPermitted,
                _ if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => Kvm::NoDevice,
                _ => Kvm::Broken(error.to_string()),
            });
        }
    }
    let kvm = kvm_ioctls::Kvm::new().map_err(|error| Kvm::Broken(error.to_string()))?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(Kvm::Broken(format!("API version {version} instead of {API_VERSION}")));
    }
    Ok(REQUIRED.iter().filter(|(_, n)| kvm.check_extension_raw(*n) <= 0).map(|(name, _)| *name).collect())
}

/// `svm` or `vmx` from the flags of /proc/cpuinfo.
fn extension(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    ["svm", "vmx"].into_iter().find(|wanted| flags.split_ascii_whitespace().any(|flag| flag == *wanted))
}

fn classify(device: Result<Vec<&'static str>, Kvm>, extension: Option<&'static str>) -> Kvm {
    match (device, extension) {
        (Err(kvm), _) => kvm,
        (Ok(_), None) => Kvm::Software,
        (Ok(missing), Some(extension)) if missing.is_empty() => Kvm::Usable { extension },
        (Ok(missing), Some(_)) => Kvm::Lacking(missing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_whole_words() {
        assert_eq!(extension("processor : 0\nflags\t\t: fpu svm_lock avx\n"), None);
        assert_eq!(extension("processor : 0\nflags\t\t: fpu svm avx\n"), Some("svm"));
        assert_eq!(extension("flags : fpu vmx\nvmx flags : vnmi\n"), Some("vmx"));
        assert_eq!(extension(""), None);
    }

    #[test]
    fn a_device_without_an_extension_is_software() {
        assert_eq!(classify(Ok(vec![]), None), Kvm::Software);
        assert_eq!(classify(Ok(vec!["KVM_CAP_IRQFD"]), None), Kvm::Software);
        assert_eq!(classify(Ok(vec![]), Some("svm")), Kvm::Usable { extension: "svm" });
        assert_eq!(classify(Ok(vec!["KVM_CAP_IRQFD"]), Some("svm")), Kvm::Lacking(vec!["KVM_CAP_IRQFD"]));
        assert_eq!(classify(Err(Kvm::NotPermitted), Some("svm")), Kvm::NotPermitted);
    }

    #[test]
    fn what_is_not_a_kvm_device_is_named() {
        assert_eq!(open(Path::new("/nonexistent/kvm")), Err(Kvm::NoDevice));
        assert!(matches!(open(Path::new("/")), Err(Kvm::Broken(_))));
    }

    #[test]
    fn everything_unusable_has_a_remedy() {
        for kvm in [
            Kvm::NoDevice,
            Kvm::NotPermitted,
            Kvm::Software,
            Kvm::Lacking(vec!["X"]),
            Kvm::Broken("x".into()),
        ] {
            assert!(!kvm.usable() && kvm.remedy().is_some(), "{kvm}");
        }
        assert_eq!(Kvm::Usable { extension: "vmx" }.remedy(), None);
    }
}
