//! What can be fetched: each item's packages, where they come from, and what it is for.

/// One thing that `cargo xtask fetch` can get.
pub struct Entry {
    /// The name it is asked for by.
    pub name: &'static str,
    /// The release of Debian whose packages are taken.
    pub suite: &'static str,
    /// Why anyone wants it, in one line.
    pub purpose: &'static str,
    /// Whether a plain `cargo xtask fetch` gets it.
    pub default: bool,
    /// What it is made of.
    pub kind: Kind,
}

/// What an item is made of.
pub enum Kind {
    /// A stock kernel with its modules.
    Kernel {
        /// The metapackage that depends on the newest kernel of the suite.
        package: &'static str,
        /// How the kernel's release must begin.
        release: &'static str,
    },
    /// Programs with every library they need, as a small system root.
    Root {
        /// The packages whose dependencies are followed.
        packages: &'static [&'static str],
        /// The programs that must be able to run afterwards.
        programs: &'static [&'static str],
    },
}

/// Everything that can be fetched, in the order in which it is fetched.
pub const CATALOG: &[Entry] = &[
    Entry {
        name: "6.12",
        suite: "trixie",
        purpose: "the kernel that guests run when none is named (cloud flavour)",
        default: true,
        kind: Kind::Kernel { package: "linux-image-cloud-amd64", release: "6.12." },
    },
    Entry {
        name: "tools",
        suite: "trixie",
        purpose: "programs for guests: busybox, ndctl, daxctl, cxl, keyctl, dmsetup, mkfs for ext4 and XFS; iasl for the tests",
        default: true,
        kind: Kind::Root {
            packages: &[
                "busybox-static",
                "ndctl",
                "daxctl",
                "cxl",
                "keyutils",
                "dmsetup",
                "e2fsprogs",
                "xfsprogs",
                "acpica-tools",
            ],
            programs: &[
                "ndctl",
                "daxctl",
                "cxl",
                "keyctl",
                "dmsetup",
                "mke2fs",
                "e2fsck",
                "mkfs.xfs",
                "xfs_io",
                "xfs_repair",
                "iasl",
            ],
        },
    },
    Entry {
        name: "6.12-plain",
        suite: "trixie",
        purpose: "the kernel of the software KVM host (its flavour has 9p)",
        default: true,
        kind: Kind::Kernel { package: "linux-image-amd64", release: "6.12." },
    },
    Entry {
        name: "qemu",
        suite: "trixie",
        purpose: "the emulator under the software KVM host, and the peer in benchmarks",
        default: true,
        kind: Kind::Root { packages: &["qemu-system-x86"], programs: &["qemu-system-x86_64"] },
    },
    Entry {
        name: "6.1",
        suite: "bookworm",
        purpose: "an older guest kernel (its cloud flavour is built without machine checks)",
        default: false,
        kind: Kind::Kernel { package: "linux-image-amd64", release: "6.1." },
    },
    Entry {
        name: "7.x",
        suite: "sid",
        purpose: "the newest guest kernel (cloud flavour)",
        default: false,
        kind: Kind::Kernel { package: "linux-image-cloud-amd64", release: "7." },
    },
];

/// Whether a package that apt would install for an item is left out of it.
///
/// apt follows the dependencies of an installation: maintainer scripts, accounts, Python bindings. Unpacked programs
/// need only libraries and data. What a program turns out to miss is found after unpacking, by its own loader.
pub fn left_out(kind: &Kind, package: &str) -> bool {
    const SCRIPTS: [&str; 24] = [
        "adduser",
        "base-passwd",
        "debconf",
        "dmsetup",
        "dpkg",
        "init-system-helpers",
        "ipxe-qemu",
        "libaudit-common",
        "libdebconfclient0",
        "libpam-modules",
        "libpam-modules-bin",
        "libpam0g",
        "libsemanage-common",
        "libsemanage2",
        "libsepol2",
        "login.defs",
        "logsave",
        "media-types",
        "netbase",
        "openssl-provider-legacy",
        "passwd",
        "readline-common",
        "tar",
        "tzdata",
    ];
    match kind {
        Kind::Kernel { .. } => {
            !["linux-image-", "linux-binary-", "linux-modules-", "linux-base-"].iter().any(|p| {
                package.strip_prefix(p).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
            })
        }
        Kind::Root { packages, .. } if packages.contains(&package) => false,
        Kind::Root { .. } => {
            SCRIPTS.contains(&package)
                || ["python3", "libpython3", "perl", "libperl"].iter().any(|p| package.starts_with(p))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        for (i, a) in CATALOG.iter().enumerate() {
            assert!(CATALOG[i + 1..].iter().all(|b| b.name != a.name), "{} twice", a.name);
        }
    }

    #[test]
    fn kernels_keep_only_their_own_packages() {
        let kernel = Kind::Kernel { package: "linux-image-cloud-amd64", release: "7." };
        assert!(!left_out(&kernel, "linux-modules-7.2.13+deb14-cloud-amd64"));
        assert!(!left_out(&kernel, "linux-image-6.1.0-50-cloud-amd64"));
        assert!(left_out(&kernel, "linux-image-cloud-amd64"));
        assert!(left_out(&kernel, "linux-base"));
        assert!(left_out(&kernel, "initramfs-tools"));
    }

    #[test]
    fn roots_keep_libraries_and_what_they_are_made_of() {
        let root = Kind::Root { packages: &[], programs: &[] };
        assert!(!left_out(&root, "libglib2.0-0t64"));
        assert!(left_out(&root, "python3-minimal") && left_out(&root, "dmsetup"));
        assert!(!left_out(&Kind::Root { packages: &["dmsetup"], programs: &[] }, "dmsetup"));
    }
}
