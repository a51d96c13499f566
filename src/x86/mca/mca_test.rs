//! Values, rules of access, rules of overwriting, and whom a machine check shuts down.

use proptest::prelude::*;

use super::status::*;
use super::*;
use crate::x86::walk::CR4_MCE;

const ADDRESS: u64 = 0x1_2345_6789;

fn smca() -> McaConfig {
    McaConfig::for_vendor(Vendor::Amd)
}

fn legacy() -> McaConfig {
    McaConfig { flavour: Flavour::AmdLegacy, ..smca() }
}

fn intel(lmce: bool) -> McaConfig {
    McaConfig { lmce, ..McaConfig::for_vendor(Vendor::Intel) }
}

fn all() -> [McaConfig; 6] {
    [
        smca(),
        legacy(),
        intel(true),
        intel(false),
        McaConfig { cmci: true, ..intel(true) },
        McaConfig { recovery: false, ..intel(false) },
    ]
}

/// A vCPU whose guest has enabled what there is.
fn state(config: McaConfig) -> McaState {
    let mut state = McaState::new(config);
    if config.lmce {
        state.wrmsr(MCG_EXT_CTL, 1).unwrap();
    }
    state
}

fn raise_error(state: &mut McaState, error: &MachineError, cr4: u64) -> Raised {
    state.raise_record(state.record(error, Reach::Architecture), Reach::Architecture, cr4)
}

fn raise(state: &mut McaState, class: ErrorClass) -> Raised {
    raise_error(state, &MachineError::line(class, ADDRESS), CR4_MCE)
}

#[test]
fn capabilities() {
    assert_eq!(intel(true).mcg_cap(), 0x900_010a);
    assert_eq!(intel(false).mcg_cap(), 0x100_010a);
    assert_eq!(smca().mcg_cap(), 0x102);
    assert_eq!(legacy().mcg_cap(), 0x10a);
    assert_eq!(McaConfig { recovery: false, ..intel(false) }.mcg_cap(), 0x10a);
}

#[test]
fn values_that_linux_recovers_from() {
    use Consequence::*;
    use ErrorClass::*;
    #[rustfmt::skip]
    let rows = [
        (intel(true), Load, 1, 0xbd80_0000_0000_0134, 0xf, MachineCheck),
        (intel(true), Fetch, 1, 0xbd80_0000_0000_0150, 0xf, MachineCheck),
        (intel(true), ActionOptional, 7, 0xbd00_0000_0000_00c0, 0xd, MachineCheck),
        (intel(true), NoAction, 7, 0xbc00_0000_0000_00c0, 0, Logged),
        (intel(true), Deferred, 7, 0xbc00_0000_0000_00c0, 0, Logged),
        (intel(true), Corrected, 7, 0x8c00_0040_0000_0090, 0, Logged),
        (intel(false), Load, 1, 0xbd80_0000_0000_0134, 7, MachineCheck),
        (smca(), Load, 1, 0xbc00_0800_0000_011b, 7, MachineCheck),
        (smca(), Fetch, 1, 0xbc00_0800_0000_011b, 7, MachineCheck),
        (smca(), Deferred, 1, 0x9c00_1800_0000_011b, 0, Logged),
        (smca(), ActionOptional, 1, 0x9c00_1800_0000_011b, 0, Logged),
        (smca(), Corrected, 1, 0x9c00_4000_0000_011b, 0, Logged),
        (legacy(), Load, 4, 0xbc00_0800_0008_011b, 7, MachineCheck),
        (legacy(), Deferred, 4, 0x9c00_1800_0008_011b, 0, Logged),
    ];
    for (config, class, bank, status, mcg_status, consequence) in rows {
        let mut state = state(config);
        let raised = raise(&mut state, class);
        let expected = Raised {
            consequence,
            broadcast: config == intel(false) && consequence == MachineCheck,
            bank,
            status,
            address: 0x1_2345_6780,
            misc: 0x86,
            mcg_status,
        };
        assert_eq!(raised, expected, "{:?} {class:?}", config.flavour);
        let base = MC0_CTL + 4 * u32::from(bank);
        assert_eq!(state.rdmsr(base + 1), Ok(status));
        assert_eq!(state.rdmsr(base + 2), Ok(0x1_2345_6780));
        assert_eq!(state.rdmsr(base + 3), Ok(0x86));
        assert_eq!(state.rdmsr(MCG_STATUS), Ok(mcg_status));
    }
}

#[test]
fn pages_corruption_and_overflow_are_said() {
    let error = MachineError {
        context_corrupt: true,
        overflow: true,
        ..MachineError::page(ErrorClass::Load, ADDRESS)
    };
    let record = error.record(&intel(false), false);
    assert_eq!((record.address, record.misc), (0x1_2345_6000, 0x8c));
    assert_eq!(record.status & (PCC | OVER | UC | S | AR), PCC | OVER | UC);
    assert_eq!(record.mcg_status, Some(MCG_EIPV), "cannot be resumed");
    assert_eq!(error.record(&smca(), true).status & (PCC | TCC), PCC | TCC);
    assert_eq!(error.record(&legacy(), true).status & (PCC | TCC), PCC);
    let deferred = MachineError { class: ErrorClass::Deferred, ..error }.record(&smca(), true);
    assert_eq!(deferred.status & (DEFERRED | UC), UC);
}

#[test]
fn without_lmce_enabled_by_the_guest_everybody_is_told() {
    let config = intel(true);
    let mut culprit = McaState::new(config);
    let error = MachineError::line(ErrorClass::Load, ADDRESS);
    let raised = raise_error(&mut culprit, &error, CR4_MCE);
    assert!(raised.broadcast && raised.mcg_status == 7);
    let mut other = McaState::new(config);
    let told = other.raise_bystander(CR4_MCE);
    assert_eq!((told.status, told.address, told.mcg_status), (0, 0, 5));
    assert_eq!((told.consequence, told.broadcast), (Consequence::MachineCheck, false));
    let again = other.raise_bystander(CR4_MCE).consequence;
    assert_eq!(again, Consequence::Shutdown(ShutdownCause::InProgress));
}

#[test]
fn how_far_an_error_goes_can_be_said() {
    for config in [smca(), intel(true), intel(false)] {
        let error = MachineError::line(ErrorClass::Load, ADDRESS);
        for (reach, broadcast) in [(Reach::Local, false), (Reach::Broadcast, true)] {
            let mut state = state(config);
            let record = state.record(&error, reach);
            let raised = state.raise_record(record, reach, CR4_MCE);
            let local = config.lmce && reach == Reach::Local;
            assert_eq!((raised.broadcast, raised.mcg_status & MCG_LMCES != 0), (broadcast, local));
        }
    }
}

#[test]
fn shutdown_when_in_progress_or_not_enabled() {
    for config in all() {
        let mut busy = state(config);
        assert_eq!(raise(&mut busy, ErrorClass::Load).consequence, Consequence::MachineCheck);
        let again = raise(&mut busy, ErrorClass::Load);
        assert_eq!(again.consequence, Consequence::Shutdown(ShutdownCause::InProgress));
        assert!(!again.broadcast && again.status & OVER != 0);
        busy.wrmsr(MCG_STATUS, 0).unwrap();
        busy.wrmsr(MC0_CTL + 4 * u32::from(again.bank) + 1, 0).unwrap();
        let later = raise(&mut busy, ErrorClass::Load);
        assert_eq!((later.consequence, later.status & OVER), (Consequence::MachineCheck, 0));

        let mut deaf = state(config);
        let raised = raise_error(&mut deaf, &MachineError::line(ErrorClass::Load, ADDRESS), 0);
        assert_eq!(raised.consequence, Consequence::Shutdown(ShutdownCause::NotEnabled));
        assert_ne!(raised.status & VAL, 0, "the next boot finds it");
        assert_eq!(raised.mcg_status, 0);
    }
}

#[test]
fn a_disabled_bank_logs_in_silence() {
    for (msr, value) in [(MC0_CTL + 4, 0), (MCG_CTL, 0)] {
        for config in [smca(), intel(true)] {
            let mut state = state(config);
            state.wrmsr(msr, value).unwrap();
            let error = MachineError::line(ErrorClass::Load, ADDRESS);
            assert!(McaState::new(config).signals(&error) && !state.signals(&error));
            let raised = raise(&mut state, ErrorClass::Load);
            assert_eq!(raised.consequence, Consequence::Logged);
            assert_eq!(raised.status & (VAL | EN), VAL);
        }
    }
    let mut one = state(smca());
    one.wrmsr(MCG_CTL, 1).unwrap();
    assert_eq!(raise(&mut one, ErrorClass::Load).consequence, Consequence::Logged, "a bit for each bank");
}

#[test]
fn worse_errors_displace_lesser_ones() {
    use ErrorClass::*;
    let log = |config: McaConfig, classes: &[ErrorClass]| {
        let mut state = state(config);
        let mut last = Option::None;
        for (step, &class) in classes.iter().enumerate() {
            let error = MachineError::line(class, 0x1000 * (step as u64 + 1));
            let record = BankRecord { bank: 1, ..error.record(&config, true) };
            last = Some(state.raise_record(record, Reach::Local, CR4_MCE));
        }
        let last = last.unwrap();
        (last.address, last.status & OVER != 0, last.status & (S | AR))
    };
    assert_eq!(log(smca(), &[Corrected, Load]), (0x2000, true, 0));
    assert_eq!(log(smca(), &[Corrected, Deferred]), (0x2000, true, 0));
    assert_eq!(log(smca(), &[Deferred, Corrected]), (0x1000, true, 0));
    assert_eq!(log(smca(), &[Load, Deferred]), (0x1000, true, 0));
    assert_eq!(log(smca(), &[Load, Load]), (0x1000, true, 0));
    assert_eq!(log(intel(true), &[Corrected, Load]), (0x2000, true, S | AR));
    assert_eq!(log(intel(true), &[Load, Corrected]), (0x1000, true, S | AR));
    assert_eq!(log(intel(true), &[NoAction, ActionOptional]), (0x1000, true, S));
    assert_eq!(log(intel(true), &[ActionOptional, Load]), (0x1000, true, S | AR));
}

#[test]
fn corrected_errors_are_counted_and_may_interrupt() {
    let mut state = state(McaConfig { cmci: true, ..intel(true) });
    let ctl2 = MC0_CTL2 + 7;
    assert!(state.wrmsr(ctl2, 1 << 31).is_err());
    state.wrmsr(ctl2, 1 << 30 | 2).unwrap();
    assert_eq!(raise(&mut state, ErrorClass::Corrected).consequence, Consequence::Logged);
    let second = raise(&mut state, ErrorClass::Corrected);
    assert_eq!(second.consequence, Consequence::CorrectedInterrupt);
    assert_eq!(second.status >> 38 & 0x7fff, 2);
    assert_eq!(second.status & OVER, 0, "what is counted is not lost");
    assert_eq!(raise(&mut state, ErrorClass::NoAction).consequence, Consequence::CorrectedInterrupt);
    let mut silent = McaState::new(intel(true));
    raise(&mut silent, ErrorClass::Corrected);
    assert_ne!(raise(&mut silent, ErrorClass::Corrected).status & OVER, 0);
}

#[test]
fn deferred_errors_have_registers_of_their_own() {
    let mut state = state(smca());
    let bank = SMCA_MC0_CTL + 16;
    raise(&mut state, ErrorClass::Deferred);
    assert_eq!(state.rdmsr(bank + 8), state.rdmsr(bank + 1));
    assert_eq!(state.rdmsr(bank + 9), Ok(0x1_2345_6780));
    state.wrmsr(bank + 1, 0).unwrap();
    state.wrmsr(bank + 8, 0).unwrap();
    state.wrmsr(bank + 4, 1 << 32).unwrap();
    assert_eq!(state.rdmsr(bank + 4), Ok(1 << 32 | 5), "the fixed bits stay");
    raise(&mut state, ErrorClass::Deferred);
    assert_eq!(state.rdmsr(bank + 1), Ok(0), "not wanted there");
    raise(&mut state, ErrorClass::Deferred);
    assert_ne!(state.rdmsr(bank + 8).unwrap() & OVER, 0);
}

#[test]
fn who_may_write_what() {
    let mut amd = McaState::new(smca());
    let bank = SMCA_MC0_CTL + 16;
    assert!(amd.wrmsr(bank + 1, 1).is_err() && amd.wrmsr(bank + 8, 1).is_err());
    assert!(amd.wrmsr(HWCR, 1 << 18 | 1 << 24 | 1 << 6).is_ok());
    assert_eq!(amd.rdmsr(HWCR), Ok(1 << 18 | 1 << 24));
    assert!(amd.wrmsr(bank + 1, 1).is_ok(), "McStatusWrEn");
    assert_eq!(amd.rdmsr(MC0_CTL + 5), Ok(1), "the old names reach the same registers");
    assert!(amd.wrmsr(HWCR, 1 << 30).is_err());
    assert!(amd.wrmsr(bank + 2, 7).is_ok() && amd.wrmsr(bank + 3, 7).is_ok());
    assert!(amd.wrmsr(bank + 5, 0).is_ok());
    assert_eq!(amd.rdmsr(bank + 5), Ok(0x96 << 32), "the identity is fixed");
    assert_eq!(amd.rdmsr(SMCA_MC0_CTL + 5), Ok(0xb0 << 32));
    assert!(amd.rdmsr(SMCA_MC0_CTL + 32).is_err(), "there are two banks");
    assert!(
        amd.rdmsr(FEATURE_CONTROL).is_err()
            && amd.rdmsr(MCG_EXT_CTL).is_err()
            && amd.rdmsr(MC0_CTL2).is_err()
    );
    assert_eq!(amd.rdmsr(MC4_MISC1), Ok(0));
    assert!(amd.rdmsr(MCA_INTERRUPT_CONFIG).is_err());
    assert!(amd.wrmsr(MCG_STATUS, 8).is_err(), "no LMCES");
    assert!(McaState::new(legacy()).rdmsr(SMCA_MC0_CTL).is_err());

    let mut intel = McaState::new(intel(true));
    assert_eq!(intel.rdmsr(FEATURE_CONTROL), Ok(1 << 20 | 1));
    assert!(intel.wrmsr(FEATURE_CONTROL, 1).is_err() && intel.wrmsr(MCG_CAP, 0).is_err());
    assert!(intel.wrmsr(MCG_EXT_CTL, 2).is_err() && intel.wrmsr(MCG_EXT_CTL, 1).is_ok());
    assert!(intel.wrmsr(MCG_CTL, 5).is_err() && intel.wrmsr(MCG_CTL, 0).is_ok());
    for register in 1..4 {
        assert!(intel.wrmsr(MC0_CTL + register, 1).is_err() && intel.wrmsr(MC0_CTL + register, 0).is_ok());
    }
    assert!(intel.wrmsr(MCG_STATUS, 0xf).is_ok() && intel.wrmsr(MCG_STATUS, 0x10).is_err());
    assert!(intel.rdmsr(HWCR).is_err() && intel.rdmsr(MC0_CTL2).is_err());
    assert!(intel.rdmsr(MC0_CTL + 40).is_err(), "there are ten banks");
}

#[test]
fn a_warm_reset_keeps_the_log() {
    for config in all() {
        let mut state = state(config);
        let raised = raise(&mut state, ErrorClass::Load);
        let base = MC0_CTL + 4 * u32::from(raised.bank);
        state.wrmsr(base, 0).unwrap();
        state.reset();
        assert_eq!(state.rdmsr(MCG_STATUS), Ok(0));
        assert_eq!(state.rdmsr(base), Ok(u64::MAX));
        assert_eq!(state.rdmsr(base + 1), Ok(raised.status));
        assert_eq!(state.rdmsr(base + 2), Ok(raised.address));
        assert_eq!(state.local(), config.flavour != Flavour::Intel);
    }
}

#[test]
fn the_filter_covers_what_is_answered_and_fits_kvm() {
    for config in all() {
        let ranges = config.msr_ranges();
        assert!(ranges.len() <= 16, "KVM_MSR_FILTER_MAX_RANGES");
        assert!(ranges.iter().all(|range| range.count <= 0x3000), "KVM_MSR_FILTER_MAX_BITMAP_SIZE");
        let state = McaState::new(config);
        for msr in (0..0x1000).chain(0xc000_0000..0xc000_3000).chain(0xc001_0000..0xc001_1000) {
            assert!(config.owns(msr) || state.rdmsr(msr).is_err(), "{msr:#x}");
        }
        assert!(!config.owns(0x178) && config.owns(0x17b) && !config.owns(0x17c));
    }
}

fn any_class() -> impl Strategy<Value = ErrorClass> {
    use ErrorClass::*;
    prop::sample::select(vec![Load, Fetch, ActionOptional, NoAction, Deferred, Corrected])
}

proptest! {
    #[test]
    fn no_access_panics_and_what_is_written_is_what_is_read(
        which in 0..6usize,
        accesses in prop::collection::vec((0..7usize, 0..0x220u32, any::<u64>(), 0..4u8), 0..64),
    ) {
        let mut state = McaState::new(all()[which]);
        for (base, offset, value, shape) in accesses {
            let msr = [MCG_CAP, FEATURE_CONTROL, MCG_EXT_CTL, MC0_CTL2, MC0_CTL, MC4_MISC1, SMCA_MC0_CTL][base];
            let msr = msr.wrapping_add(offset);
            let value = [0, u64::MAX, value, value & 0xff][usize::from(shape)];
            let before = state.clone();
            let exists = state.rdmsr(msr).is_ok();
            match state.wrmsr(msr, value) {
                Ok(()) => prop_assert!(exists),
                Err(_) => prop_assert_eq!(&before, &state, "a refused write changes nothing"),
            }
        }
    }

    #[test]
    fn every_error_is_logged_or_counted_as_lost(
        which in 0..6usize,
        errors in prop::collection::vec(
            (any_class(), any::<u64>(), any::<u8>(), any::<bool>(), any::<bool>(), any::<bool>()), 1..16),
    ) {
        let config = all()[which];
        let mut state = state(config);
        for (class, address, granularity, context_corrupt, overflow, handled) in errors {
            let in_progress = state.rdmsr(MCG_STATUS).unwrap() & MCG_MCIP != 0;
            let error = MachineError { class, address, granularity, context_corrupt, overflow };
            let raised = raise_error(&mut state, &error, CR4_MCE);
            prop_assert_ne!(raised.status & VAL, 0);
            let expected = error.record(&config, state.local());
            prop_assert!(raised.address == expected.address || raised.status & OVER != 0 || config.cmci);
            if expected.mcg_status.is_some() {
                let check = if in_progress {
                    Consequence::Shutdown(ShutdownCause::InProgress)
                } else {
                    Consequence::MachineCheck
                };
                prop_assert_eq!(raised.consequence, check);
                prop_assert_eq!(raised.mcg_status & MCG_MCIP, MCG_MCIP);
            }
            if handled {
                state.wrmsr(MC0_CTL + 4 * u32::from(raised.bank) + 1, 0).unwrap();
                state.wrmsr(MCG_STATUS, 0).unwrap();
            }
        }
    }

    #[test]
    fn expert_records_of_any_shape_are_taken(
        which in 0..6usize, bank in any::<u8>(), status in any::<u64>(), address in any::<u64>(),
        misc in any::<u64>(), mcg_status in any::<Option<u64>>(), cr4 in any::<u64>(),
    ) {
        let mut state = McaState::new(all()[which]);
        let raised = state.raise_record(BankRecord { bank, status, address, misc, mcg_status }, Reach::Architecture, cr4);
        prop_assert!(raised.bank < state.config().banks());
    }
}
