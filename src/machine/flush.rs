//! What is asked of the flushes of virtio-pmem devices.

use aconite_devices::bus::{Effects, lock};
use aconite_devices::virtio::pmem::{Action, Armed, Fault, Pmem};
use aconite_devices::virtio::{MAX_FAULTS, VirtioPci};

use super::memory::MemoryDevices;
use crate::command::{
    DeviceState, Error, ErrorCode, FlushAction, FlushArmed, FlushChange, FlushFault, FlushHeldRequest,
    FlushRelease, FlushState,
};
use crate::units::TimeSpan;

impl MemoryDevices {
    /// Changes what becomes of a device's flushes, and says how they stand; what that leaves to do in the machine goes to
    /// `effects`.
    pub fn flushes(
        &self,
        id: &str,
        change: &FlushChange,
        effects: &mut Effects,
    ) -> Result<FlushState, Error> {
        let device = self.find(id)?;
        let Some(card) = &device.card else {
            return Err(Error::new(
                ErrorCode::NotSupported,
                format!("{id} is an NVDIMM: the guest flushes it by itself, and waits for no answer"),
                "name a virtio-pmem device (via=virtio)",
            ));
        };
        if *change != FlushChange::Show && device.state == DeviceState::Departed {
            self.present(id)?;
        }
        let mut function = lock(&card.function);
        match change {
            FlushChange::Show => {}
            FlushChange::Arm(fault) => arm(id, &mut function, fault)?,
            FlushChange::Disarm(number) => disarm(id, &mut function, *number)?,
            FlushChange::Release(release) => {
                let_go_on(id, &mut function, release)?;
                function.service(effects);
            }
        }
        Ok(state(id, function.device()))
    }
}

fn arm(id: &str, function: &mut VirtioPci<Pmem>, wanted: &FlushFault) -> Result<(), Error> {
    if wanted.count == Some(0) {
        return Err(Error::new(
            ErrorCode::BadParameter,
            format!("A fault of {id} that takes 0 flushes does nothing"),
            "give count=1 or more",
        ));
    }
    let action = match wanted.action {
        FlushAction::Hold => Action::Hold,
        FlushAction::Delay { time } => Action::Delay(time.0),
        FlushAction::Fail => Action::Fail,
    };
    let fault = Fault { pattern: (), skip: wanted.skip, count: wanted.count, action };
    let armed = function.device_mut().arm(fault);
    armed.map(drop).ok_or_else(|| {
        Error::new(
            ErrorCode::WrongDeviceState,
            format!("{id} has {MAX_FAULTS} faults, and no room for another"),
            "take some away first (ctl flush disarm)",
        )
    })
}

fn disarm(id: &str, function: &mut VirtioPci<Pmem>, number: Option<u64>) -> Result<(), Error> {
    let unwanted = |armed: &Armed| number.is_none_or(|number| armed.number == number);
    let gone = function.device_mut().disarm(unwanted);
    match number {
        Some(number) if gone.is_empty() => Err(Error::new(
            ErrorCode::WrongDeviceState,
            format!("{id} has no fault {number}"),
            "see ctl flush show; a fault that has taken its number of flushes is gone",
        )),
        _ => Ok(()),
    }
}

fn let_go_on(id: &str, function: &mut VirtioPci<Pmem>, wanted: &FlushRelease) -> Result<(), Error> {
    let device = function.device_mut();
    let all = wanted.requests.is_empty();
    let numbers = match all {
        true => device.held().iter().map(|held| held.number).collect(),
        false => wanted.requests.clone(),
    };
    device.release(&numbers, wanted.fail).map_err(|number| {
        Error::new(
            ErrorCode::WrongDeviceState,
            format!("Flush {number} of {id} is not held"),
            "see ctl flush show for those that are",
        )
    })?;
    if all && !wanted.keep {
        device.disarm(|armed| armed.fault.action != Action::Fail);
    }
    Ok(())
}

fn state(id: &str, device: &Pmem) -> FlushState {
    let nanoseconds = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let armed = |armed: &Armed| FlushArmed {
        number: armed.number,
        fault: FlushFault {
            action: match armed.fault.action {
                Action::Hold => FlushAction::Hold,
                Action::Delay(time) => FlushAction::Delay { time: TimeSpan(time) },
                Action::Fail => FlushAction::Fail,
            },
            skip: armed.fault.skip,
            count: armed.fault.count,
        },
        seen: armed.seen,
        taken: armed.taken,
    };
    FlushState {
        device: id.to_owned(),
        in_flight: device.in_flight() as u64,
        faults: device.faults().iter().map(armed).collect(),
        held: device
            .held()
            .iter()
            .map(|held| FlushHeldRequest {
                request: held.number,
                fault: held.fault,
                held_ns: nanoseconds(held.waited),
                left_ns: held.left.map(nanoseconds),
            })
            .collect(),
    }
}
