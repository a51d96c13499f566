//! Presets: machines that have a name, said in the options that anybody could give.

use aconite_acpi::Lie;

use super::error::ConfigError;
use super::{Machine, Pmem};

/// The names of all presets.
const NAMES: [&str; 3] = ["nfit_test", "nvdimm64", "nfit_lies"];

/// The shape of the kernel's mock (`tools/testing/nvdimm/test/nfit.c`) after its DIMM has been hot-added: on one bus five
/// DIMMs, of which two provide a range and four another one, with the fifth alone behind a third; on the other bus a DIMM
/// without labels that reports failures, a virtual CD, and a DIMM that could not be mapped.
const NFIT_TEST: [&str; 6] = [
    "id=pm0,size=32M,bus=bus0,dimms=dimm0+dimm1,flags=smart_notify",
    "id=pm1,size=64M,bus=bus0,dimms=dimm0+dimm1+dimm2+dimm3,flags=smart_notify",
    "id=pm2,size=32M,bus=bus0,dimms=dimm4,flags=smart_notify",
    "id=pm3,size=32M,bus=bus1,labels=none,flags=save_fail+restore_fail+flush_fail+not_armed",
    "id=cd0,size=4M,bus=bus1,range=vcd",
    "id=pm4,size=32M,bus=bus1,labels=none,flags=map_fail",
];

impl Machine {
    /// Adds what a preset has.
    ///
    /// # Errors
    /// There is no preset of this name.
    pub fn apply_preset(&mut self, option: &str, name: &str) -> Result<(), ConfigError> {
        let devices: Vec<String> = match name {
            "nfit_test" => NFIT_TEST.map(str::to_owned).to_vec(),
            "nvdimm64" => (0..8).map(|bus| format!("id=set{bus},size=512M,dimms=8,interleave=256")).collect(),
            "nfit_lies" => {
                let lies =
                    Lie::ALL.iter().map(|lie| format!("id={name},size=64M,lie={name}", name = lie.name()));
                ["id=honest,size=64M".to_owned()].into_iter().chain(lies).collect()
            }
            _ => {
                return Err(ConfigError::invalid(
                    option,
                    name,
                    "there is no such preset",
                    format_args!("give one of {}", NAMES.join(", ")),
                ));
            }
        };
        for text in devices {
            self.pmem.push(Pmem::parse(option, &text)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preset(name: &str) -> Machine {
        let mut machine = Machine { kernel: "k".into(), ..Machine::default() };
        machine.apply_preset("--preset", name).unwrap();
        machine.complete();
        machine.validate().unwrap();
        machine
    }

    #[test]
    fn presets_are_machines() {
        assert_eq!(preset("nfit_test").units(), [0, 0, 0, 1, 1, 1]);
        let many = preset("nvdimm64");
        assert_eq!(many.pmem.iter().map(|pmem| pmem.dimms.count()).sum::<u32>(), 64);
        assert_eq!(many.units().len(), 8);
        assert_eq!(preset("nfit_lies").pmem.len(), 1 + Lie::ALL.len());
    }

    #[test]
    fn others_are_refused_by_name() {
        let error = Machine::default().apply_preset("--preset", "nfit").unwrap_err().to_string();
        assert_eq!(
            error,
            "Wrong --preset nfit: there is no such preset; give one of nfit_test, nvdimm64, nfit_lies"
        );
    }
}
