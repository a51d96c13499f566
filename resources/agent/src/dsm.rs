//! One call of the `_DSM` of a DIMM or of its root device, with bytes of the caller's (`ND_CMD_CALL`, `struct nd_cmd_pkg`
//! of include/uapi/linux/ndctl.h).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// The command's name on the agent's command line.
pub const COMMAND: &str = "dsm";

/// Bytes of `struct nd_cmd_pkg` before its payload.
const HEADER: usize = 64;
/// Most bytes of input, and of output.
const MOST: u32 = 1 << 20;
/// `ND_IOCTL_CALL`: `_IOWR('N', ND_CMD_CALL, struct nd_cmd_pkg)`.
const CALL: u64 = 3 << 30 | (HEADER as u64) << 16 | (b'N' as u64) << 8 | 10;

/// What is to be called.
#[derive(Debug, PartialEq, Eq)]
struct Call {
    /// A device of /dev: `nmem0` for a DIMM, `ndctl0` for a root device.
    device: String,
    /// Number of the family (`NVDIMM_FAMILY_*`, `NVDIMM_BUS_FAMILY_*`).
    family: u64,
    function: u64,
    /// Bytes of output to make room for.
    room: u32,
    input: Vec<u8>,
}

impl Call {
    fn parse(words: &[&str]) -> Result<Self, String> {
        let (device, family, function, room, input) = match *words {
            [device, family, function, room] => (device, family, function, room, ""),
            [device, family, function, room, input] => (device, family, function, room, input),
            _ => return Err("name a device, a family, a function and the bytes of its output".to_owned()),
        };
        let number = |text: &str| {
            text.parse::<u64>().map_err(|_| format!("{text:?} is no number: give one in decimal digits"))
        };
        let bytes = input.as_bytes().chunks(2).map(|digits| {
            let hexadecimal = digits.len() == 2 && digits.iter().all(u8::is_ascii_hexdigit);
            let digits = std::str::from_utf8(digits).ok().filter(|_| hexadecimal);
            digits.and_then(|digits| u8::from_str_radix(digits, 16).ok())
        });
        let input: Option<Vec<u8>> = bytes.collect();
        let call = Call {
            device: device.to_owned(),
            family: number(family)?,
            function: number(function)?,
            room: u32::try_from(number(room)?).unwrap_or(u32::MAX),
            input: input.ok_or("the input is not in pairs of hexadecimal digits")?,
        };
        match call.room.max(call.input.len() as u32) {
            0..=MOST => Ok(call),
            bytes => Err(format!("{bytes} bytes are too many: at most {MOST}")),
        }
    }

    /// The package, with room for the output behind the input.
    fn package(&self) -> Vec<u8> {
        let mut package = Vec::with_capacity(HEADER + self.input.len() + self.room as usize);
        package.extend_from_slice(&self.family.to_ne_bytes());
        package.extend_from_slice(&self.function.to_ne_bytes());
        package.extend_from_slice(&(self.input.len() as u32).to_ne_bytes());
        package.extend_from_slice(&self.room.to_ne_bytes());
        package.resize(HEADER, 0);
        package.extend_from_slice(&self.input);
        package.resize(package.len() + self.room as usize, 0);
        package
    }

    fn submit(&self) -> io::Result<Vec<u8>> {
        let file = File::options().read(true).write(true).open(format!("/dev/{}", self.device))?;
        let mut package = self.package();
        // SAFETY: the kernel reads and writes a package of the lengths that its header tells, which is as long.
        if unsafe { libc::ioctl(file.as_raw_fd(), CALL, package.as_mut_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(package.split_off(HEADER + self.input.len()))
    }
}

/// Calls, and returns the output in hexadecimal digits.
///
/// # Errors
/// Why there is no output, in words.
pub fn run(words: &[&str]) -> Result<String, String> {
    let call = Call::parse(words)?;
    let output = call.submit().map_err(|error| format!("/dev/{}: {error}", call.device))?;
    Ok(output.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_laid_out_as_the_kernel_has_it() {
        assert_eq!(CALL, 0xc040_4e0a);
        let call = Call::parse(&["nmem0", "1", "10", "4", "01ff"]).unwrap();
        let package = call.package();
        assert_eq!(package.len(), 64 + 2 + 4);
        assert_eq!((package[0], package[8], package[16], package[20]), (1, 10, 2, 4));
        assert_eq!(package[64..], [1, 0xff, 0, 0, 0, 0]);
    }

    #[test]
    fn what_makes_no_call_is_told() {
        for (words, why) in [
            (&["nmem0", "0", "10"][..], "name a device"),
            (&["nmem0", "x", "10", "4"], "\"x\" is no number"),
            (&["nmem0", "0", "10", "4", "1"], "pairs of hexadecimal digits"),
            (&["nmem0", "0", "10", "4", "+1"], "pairs of hexadecimal digits"),
            (&["nmem0", "0", "10", "9999999999"], "too many"),
        ] {
            let error = Call::parse(words).unwrap_err();
            assert!(error.contains(why), "{words:?}: {error}");
        }
    }
}
