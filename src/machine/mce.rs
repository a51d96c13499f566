//! From a request for a machine check to what is injected: everything that makes no sense is refused by name.

use crate::command::{Error, ErrorCode, MceClass, MceMode, MceOrigin, MceReach, MceRegisters, MceRequest};
use crate::fault::{InjectError, Injection, Mode, What};
use crate::units::Address;
use crate::x86::mca::{
    BankRecord, ErrorClass, Flavour, MCG_EIPV, MCG_LMCES, MCG_MCIP, MCG_RIPV, MachineError, McaConfig, Reach,
    status,
};

/// Granularities that a request may name: a line, and the sizes of pages.
const GRANULARITIES: [u8; 3] = [6, 12, 21];

/// What `request` asks for, of a guest with this machine-check architecture and this many address bits.
pub fn injection(request: &MceRequest, config: &McaConfig, address_bits: u8) -> Result<Injection, Error> {
    let what = match (request.class, &request.registers) {
        (Some(class), None) => What::Error(error(request, class, address_bits)?),
        (None, Some(registers)) => What::Record(record(request, registers, config)?),
        (Some(_), Some(_)) => {
            return Err(wrong("Both a class and registers are given", "give one of them"));
        }
        (None, None) => {
            return Err(wrong(
                "Neither a class nor registers are given",
                "give a class and an address, such as srar and 0x100000000, or a bank and its status",
            ));
        }
    };
    let reach = match request.reach {
        None => Reach::Architecture,
        Some(MceReach::Local) => Reach::Local,
        Some(MceReach::Broadcast) if config.flavour == Flavour::Intel => Reach::Broadcast,
        Some(MceReach::Broadcast) => {
            return Err(wrong(
                "A broadcast is asked for, and machine checks of AMD processors are always local",
                "leave it out, or start a machine with --cpu vendor=intel",
            ));
        }
    };
    let mode = request.mode.map(|mode| match mode {
        MceMode::User => Mode::User,
        MceMode::Kernel => Mode::Kernel,
    });
    Ok(Injection { what, reach, origin: MceOrigin::Request, mode })
}

fn error(request: &MceRequest, class: MceClass, address_bits: u8) -> Result<MachineError, Error> {
    let Some(Address(address)) = request.address else {
        return Err(wrong("No address is given", "give the guest-physical address of the error"));
    };
    if address.checked_shr(address_bits.into()).unwrap_or(0) != 0 {
        return Err(wrong(
            format!("The address {address:#x} is none of the guest's, which have {address_bits} bits"),
            format!("give one below {:#x}", 1u64.checked_shl(address_bits.into()).unwrap_or(u64::MAX)),
        ));
    }
    let granularity = request.granularity.unwrap_or(GRANULARITIES[0]);
    if !GRANULARITIES.contains(&granularity) {
        return Err(wrong(
            format!("The granularity {granularity} is none"),
            "give 6 for a line, 12 for a page of 4 KiB, or 21 for one of 2 MiB",
        ));
    }
    let class = match class {
        MceClass::Srar | MceClass::Fatal => ErrorClass::Load,
        MceClass::SrarFetch => ErrorClass::Fetch,
        MceClass::Srao => ErrorClass::ActionOptional,
        MceClass::Ucna => ErrorClass::NoAction,
        MceClass::Deferred => ErrorClass::Deferred,
        MceClass::Corrected => ErrorClass::Corrected,
    };
    if class == ErrorClass::Corrected && request.context_corrupt {
        return Err(wrong("A corrected error corrupts no context", "give another class, or leave that out"));
    }
    let context_corrupt = request.context_corrupt || request.class == Some(MceClass::Fatal);
    Ok(MachineError { class, address, granularity, context_corrupt, overflow: request.overflow })
}

fn record(request: &MceRequest, registers: &MceRegisters, config: &McaConfig) -> Result<BankRecord, Error> {
    if request.address.is_some()
        || request.granularity.is_some()
        || request.context_corrupt
        || request.overflow
    {
        return Err(wrong(
            "Registers are given, and beside them what follows from them",
            "give address, granularity, PCC and OVER as bits of the registers",
        ));
    }
    let status = registers.status.0;
    if status & status::VAL == 0 {
        return Err(wrong(
            format!("MCi_STATUS {status:#x} says that the bank holds no error"),
            format!("set bit 63 (VAL): {:#x}", status | status::VAL),
        ));
    }
    let known = MCG_RIPV | MCG_EIPV | MCG_MCIP | if config.lmce { MCG_LMCES } else { 0 };
    if let Some(Address(bits)) = registers.mcg_status
        && bits & !known != 0
    {
        return Err(wrong(
            format!("MCG_STATUS {bits:#x} has bits that the guest's processor does not"),
            format!("give no other bits than {known:#x}"),
        ));
    }
    Ok(BankRecord {
        bank: registers.bank,
        status,
        address: registers.address.0,
        misc: registers.misc.0,
        mcg_status: registers.mcg_status.map(|bits| bits.0),
    })
}

fn wrong(message: impl Into<String>, remedy: impl Into<String>) -> Error {
    Error::new(ErrorCode::BadParameter, message, remedy)
}

/// A refusal of the injector.
pub fn refused(error: InjectError) -> Error {
    let code = match error {
        InjectError::NoSuchVcpu { .. } => ErrorCode::NoSuchVcpu,
        InjectError::NoSuchBank { .. } => ErrorCode::BadParameter,
        InjectError::Full { .. } => ErrorCode::WrongState,
    };
    let text = error.to_string();
    let (message, remedy) = text.split_once(": ").unwrap_or((&text, ""));
    Error::new(code, message, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::cpuid::Vendor;

    fn asked(change: impl FnOnce(&mut MceRequest), vendor: Vendor) -> Result<Injection, String> {
        let mut request = MceRequest {
            class: Some(MceClass::Srar),
            address: Some(Address(0x1_0000_0040)),
            ..MceRequest::default()
        };
        change(&mut request);
        injection(&request, &McaConfig::for_vendor(vendor), 40).map_err(|error| error.to_string())
    }

    fn registers(change: impl FnOnce(&mut MceRegisters)) -> Result<Injection, String> {
        let mut registers = MceRegisters {
            bank: 1,
            status: Address(status::VAL),
            address: Address(0),
            misc: Address(0),
            mcg_status: None,
        };
        change(&mut registers);
        asked(|r| *r = MceRequest { registers: Some(registers), ..MceRequest::default() }, Vendor::Intel)
    }

    #[test]
    fn what_is_asked_for_is_raised() {
        let fatal = asked(|r| r.class = Some(MceClass::Fatal), Vendor::Amd).unwrap();
        let What::Error(error) = fatal.what else { panic!("{fatal:?}") };
        assert!(error.context_corrupt && error.granularity == 6);
        assert_eq!((fatal.reach, fatal.origin), (Reach::Architecture, MceOrigin::Request));
        let wide = asked(|r| (r.granularity, r.reach) = (Some(21), Some(MceReach::Broadcast)), Vendor::Intel);
        assert_eq!(wide.unwrap().reach, Reach::Broadcast);
        let What::Record(record) = registers(|r| r.mcg_status = Some(Address(0xf))).unwrap().what else {
            panic!("registers are taken as they are")
        };
        assert_eq!((record.bank, record.mcg_status), (1, Some(0xf)));
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let words = |change: fn(&mut MceRequest)| asked(change, Vendor::Amd).unwrap_err();
        assert_eq!(
            words(|r| r.address = Some(Address(1 << 40))),
            "The address 0x10000000000 is none of the guest's, which have 40 bits; give one below 0x10000000000"
        );
        assert_eq!(
            words(|r| r.granularity = Some(7)),
            "The granularity 7 is none; give 6 for a line, 12 for a page of 4 KiB, or 21 for one of 2 MiB"
        );
        assert!(words(|r| r.address = None).starts_with("No address is given"));
        assert!(words(|r| r.class = None).starts_with("Neither a class nor registers"));
        assert!(words(|r| r.reach = Some(MceReach::Broadcast)).contains("always local"));
        assert!(
            words(|r| (r.class, r.context_corrupt) = (Some(MceClass::Corrected), true))
                .starts_with("A corrected error corrupts no context")
        );
        assert_eq!(
            registers(|r| r.status = Address(7)).unwrap_err(),
            "MCi_STATUS 0x7 says that the bank holds no error; set bit 63 (VAL): 0x8000000000000007"
        );
        assert!(registers(|r| r.mcg_status = Some(Address(16))).unwrap_err().contains("0x10 has bits"));
        assert_eq!(
            refused(InjectError::NoSuchVcpu { vcpu: 9, count: 2 }).to_string(),
            "There is no vCPU 9; the machine has 2, numbered from 0"
        );
    }
}
