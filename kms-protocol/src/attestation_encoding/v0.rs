//! V0: the SCALE layout (§4.3).

use super::model::{
    Attestation, PcrValue, PlatformEvidence, RuntimeEvent, Stack, TdxEvent, TdxEvidence, TpmEvent,
    TpmPlatform, TpmQuote,
};
use super::scale::{Reader, Writer};
use super::{Error, Version};

pub(super) fn decode(bytes: &[u8]) -> Result<Attestation, Error> {
    let mut reader = Reader::new(bytes);
    let version = reader.u8("version")?;
    debug_assert_eq!(version, 0, "{:?} is what the caller saw", Version::V0);
    let platform = match reader.u8("quote kind")? {
        0 => PlatformEvidence::Tdx(tdx(&mut reader)?),
        1 => PlatformEvidence::GcpTdx(tdx(&mut reader)?, tpm_quote(&mut reader)?),
        2 => PlatformEvidence::NitroEnclave { nsm_quote: reader.bytes("nsm_quote")? },
        3 => PlatformEvidence::SevSnp {
            report: reader.bytes("report")?,
            cert_chain: reader.list("cert_chain", 1, |reader| reader.bytes("cert_chain"))?,
            mr_config: reader.string("mr_config")?,
        },
        4 => PlatformEvidence::AwsNitroTpm { attestation_doc: reader.bytes("attestation_doc")? },
        _ => return Err(Error::UnknownName { what: "quote kind" }),
    };
    let runtime_events = reader.list("runtime_events", 2, |reader| {
        Ok(RuntimeEvent { event: reader.string("event")?, payload: reader.bytes("payload")?, version: 1 })
    })?;
    let report_data = reader.fixed64("report_data")?;
    let config = reader.string("config")?;
    reader.end()?;
    Ok(Attestation { platform, runtime_events, report_data, config, stack: Stack::Dstack })
}

fn tdx(reader: &mut Reader<'_>) -> Result<TdxEvidence, Error> {
    Ok(TdxEvidence {
        quote: reader.bytes("quote")?,
        event_log: reader.list("event_log", 11, |reader| {
            Ok(TdxEvent {
                imr: reader.u32("imr")?,
                event_type: reader.u32("event_type")?,
                digest: reader.bytes("digest")?,
                event: reader.string("event")?,
                event_payload: reader.bytes("event_payload")?,
            })
        })?,
    })
}

fn tpm_quote(reader: &mut Reader<'_>) -> Result<TpmQuote, Error> {
    Ok(TpmQuote {
        message: reader.bytes("message")?,
        signature: reader.bytes("signature")?,
        pcr_values: reader.list("pcr_values", 6, |reader| {
            Ok(PcrValue {
                index: reader.u32("index")?,
                algorithm: reader.string("algorithm")?,
                value: reader.bytes("value")?,
            })
        })?,
        ak_cert: reader.bytes("ak_cert")?,
        platform: match reader.u8("platform")? {
            0 => TpmPlatform::Dstack,
            1 => TpmPlatform::Gcp,
            2 => TpmPlatform::NitroEnclave,
            3 => TpmPlatform::AwsEc2,
            _ => return Err(Error::UnknownName { what: "platform" }),
        },
        event_log: reader.list("event_log", 5, |reader| {
            Ok(TpmEvent { pcr_index: reader.u32("pcr_index")?, digest: reader.bytes("digest")? })
        })?,
    })
}

pub(super) fn encode(attestation: &Attestation) -> Result<Vec<u8>, Error> {
    if attestation.stack != Stack::Dstack {
        return Err(Error::NotInV0 { what: "the payload of a pod" });
    }
    if attestation.runtime_events.iter().any(|event| event.version != 1) {
        return Err(Error::NotInV0 { what: "events of version 2" });
    }
    let mut writer = Writer::default();
    writer.u8(0);
    match &attestation.platform {
        PlatformEvidence::Tdx(tdx) => {
            writer.u8(0);
            write_tdx(&mut writer, tdx);
        }
        PlatformEvidence::GcpTdx(tdx, tpm_quote) => {
            writer.u8(1);
            write_tdx(&mut writer, tdx);
            write_tpm_quote(&mut writer, tpm_quote);
        }
        PlatformEvidence::NitroEnclave { nsm_quote } => {
            writer.u8(2);
            writer.bytes(nsm_quote);
        }
        PlatformEvidence::SevSnp { report, cert_chain, mr_config } => {
            writer.u8(3);
            writer.bytes(report);
            writer.list(cert_chain, |writer, der| writer.bytes(der));
            writer.string(mr_config);
        }
        PlatformEvidence::AwsNitroTpm { attestation_doc } => {
            writer.u8(4);
            writer.bytes(attestation_doc);
        }
    }
    writer.list(&attestation.runtime_events, |writer, event| {
        writer.string(&event.event);
        writer.bytes(&event.payload);
    });
    writer.raw(&attestation.report_data);
    writer.string(&attestation.config);
    Ok(writer.out)
}

fn write_tdx(writer: &mut Writer, tdx: &TdxEvidence) {
    writer.bytes(&tdx.quote);
    writer.list(&tdx.event_log, |writer, event| {
        writer.u32(event.imr);
        writer.u32(event.event_type);
        writer.bytes(&event.digest);
        writer.string(&event.event);
        writer.bytes(&event.event_payload);
    });
}

fn write_tpm_quote(writer: &mut Writer, quote: &TpmQuote) {
    writer.bytes(&quote.message);
    writer.bytes(&quote.signature);
    writer.list(&quote.pcr_values, |writer, pcr| {
        writer.u32(pcr.index);
        writer.string(&pcr.algorithm);
        writer.bytes(&pcr.value);
    });
    writer.bytes(&quote.ak_cert);
    writer.u8(match quote.platform {
        TpmPlatform::Dstack => 0,
        TpmPlatform::Gcp => 1,
        TpmPlatform::NitroEnclave => 2,
        TpmPlatform::AwsEc2 => 3,
    });
    writer.list(&quote.event_log, |writer, event| {
        writer.u32(event.pcr_index);
        writer.bytes(&event.digest);
    });
}
