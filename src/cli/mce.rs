//! `aconite ctl mce`: the arguments of a machine check on request.

use clap::Args;

use crate::command::{MceClass, MceMode, MceReach, MceRegisters, MceRequest};
use crate::units::{Address, UnitError};

/// Arguments of `aconite ctl mce`: a class and an address, or a bank and its registers.
#[derive(Debug, Clone, Args)]
#[command(group = clap::ArgGroup::new("what").required(true))]
pub struct MceArgs {
    /// The vCPU
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub vcpu: u32,
    /// The kind of error
    #[arg(long, value_enum, group = "what", requires = "address")]
    pub class: Option<MceClass>,
    /// Guest-physical address of the error
    #[arg(long, value_name = "GPA", requires = "class")]
    pub address: Option<String>,
    /// Low bits of the address that are unknown: 6, 12 or 21 [default: 6]
    #[arg(long, value_name = "BITS", requires = "class")]
    pub granularity: Option<u8>,
    /// The processor's context is corrupt
    #[arg(long, requires = "class")]
    pub pcc: bool,
    /// Another error was lost
    #[arg(long, requires = "class")]
    pub over: bool,
    /// All vCPUs get the machine check (Intel)
    #[arg(long, conflicts_with = "local")]
    pub broadcast: bool,
    /// This vCPU alone gets the machine check, whatever the processor is
    #[arg(long)]
    pub local: bool,
    /// The error waits until the vCPU runs in this mode [default: it comes at once]
    #[arg(long, value_enum)]
    pub mode: Option<MceMode>,
    /// For experts: the bank, of which all registers are given
    #[arg(long, value_name = "N", group = "what", requires = "status")]
    pub bank: Option<u8>,
    /// MCi_STATUS
    #[arg(long, value_name = "VALUE", requires = "bank")]
    pub status: Option<String>,
    /// MCi_ADDR [default: 0]
    #[arg(long, value_name = "VALUE", requires = "bank")]
    pub addr: Option<String>,
    /// MCi_MISC [default: 0]
    #[arg(long, value_name = "VALUE", requires = "bank")]
    pub misc: Option<String>,
    /// MCG_STATUS, to which MCIP is added [default: the error is only logged]
    #[arg(long, value_name = "VALUE", requires = "bank")]
    pub mcg_status: Option<String>,
}

impl MceArgs {
    /// The request.
    ///
    /// # Errors
    /// An address or a register is no number.
    pub fn request(&self) -> Result<MceRequest, UnitError> {
        let number = |text: &Option<String>| text.as_deref().map(str::parse::<Address>).transpose();
        let registers = match (self.bank, number(&self.status)?) {
            (Some(bank), Some(status)) => Some(MceRegisters {
                bank,
                status,
                address: number(&self.addr)?.unwrap_or_default(),
                misc: number(&self.misc)?.unwrap_or_default(),
                mcg_status: number(&self.mcg_status)?,
            }),
            _ => None,
        };
        Ok(MceRequest {
            class: self.class,
            address: number(&self.address)?,
            granularity: self.granularity,
            context_corrupt: self.pcc,
            overflow: self.over,
            registers,
            reach: match (self.broadcast, self.local) {
                (true, _) => Some(MceReach::Broadcast),
                (_, true) => Some(MceReach::Local),
                _ => None,
            },
            mode: self.mode,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: MceArgs,
    }

    fn request(line: &str) -> Option<MceRequest> {
        let matches = Line::command().try_get_matches_from(format!("mce {line}").split_whitespace()).ok()?;
        Line::from_arg_matches(&matches).ok()?.args.request().ok()
    }

    #[test]
    fn a_class_or_registers() {
        let by_class = request(
            "--vcpu 1 --class srao --address 0x1040 --granularity 12 --pcc --over --broadcast --mode user",
        );
        assert_eq!(
            by_class,
            Some(MceRequest {
                class: Some(MceClass::Srao),
                address: Some(Address(0x1040)),
                granularity: Some(12),
                context_corrupt: true,
                overflow: true,
                registers: None,
                reach: Some(MceReach::Broadcast),
                mode: Some(MceMode::User),
            })
        );
        let by_registers = request("--bank 4 --status 0x8000000000000000 --mcg-status 7 --local").unwrap();
        let registers = by_registers.registers.unwrap();
        assert_eq!((registers.bank, registers.mcg_status), (4, Some(Address(7))));
        assert_eq!((registers.address, by_registers.reach), (Address(0), Some(MceReach::Local)));
        for wrong in [
            "",
            "--class srar",
            "--class srar --address here",
            "--class worst --address 0",
            "--bank 1",
            "--bank 1 --status 1 --class srar --address 0",
            "--bank 1 --status 1 --pcc",
            "--class srar --address 0 --local --broadcast",
        ] {
            assert_eq!(request(wrong), None, "{wrong}");
        }
    }
}
