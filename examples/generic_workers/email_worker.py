"""Sends e-mail for any application: job messages to the queue `email`.

SMTP_HOST and SMTP_PORT say where the mail server is (localhost:25), MAIL_FROM who sends.
"""

import os
import smtplib
from email.message import EmailMessage

from pydantic import BaseModel, Field

from streamtools import ConsumerFactory, ConsumerRunner, Message, Reject, Retry
from streamtools.jobs import JobMessage

HOST, PORT = os.environ.get("SMTP_HOST", "localhost"), int(os.environ.get("SMTP_PORT", "25"))
SENDER = os.environ.get("MAIL_FROM", "no-reply@localhost")
#: Seconds for each answer of the mail server.
TIMEOUT = 30

consumers = ConsumerFactory(retry=Retry(retries=5, delay=1), concurrency=4)


class Mail(BaseModel):
    """What `data` holds: to whom, and what."""

    to: list[str] = Field(min_length=1)
    subject: str
    body: str


class MailJob(JobMessage):
    """A job message with such data. Any other goes to the error queue, with the reason."""

    data: Mail


@consumers.route("email")
def send_email(job: MailJob, message: Message) -> None:
    """Send a mail. A `def` handler runs in a thread, so it may wait for the mail server."""
    mail = compose(job.data, message.id)
    try:
        with smtplib.SMTP(HOST, PORT, timeout=TIMEOUT) as server:
            refused = server.send_message(mail)
    except smtplib.SMTPRecipientsRefused as error:
        reject_if_final([code for code, _ in error.recipients.values()], error)
        raise
    except smtplib.SMTPResponseException as error:
        reject_if_final([error.smtp_code], error)
        raise  # temporary: the retry policy tries again, as for a server that does not answer
    print(f"{job.title}: sent to {len(job.data.to) - len(refused)}, refused by {len(refused)}", flush=True)


def compose(data: Mail, id: str) -> EmailMessage:  # noqa: A002 - the field's name
    """The mail. If it is sent twice, both have the same Message-ID."""
    mail = EmailMessage()
    try:
        mail["From"], mail["To"], mail["Subject"] = SENDER, ", ".join(data.to), data.subject
        mail["Message-ID"] = f"<{id}@{SENDER.rpartition('@')[2]}>"
    except ValueError as error:  # a line break in the subject, which could forge another header
        raise Reject(f"no mail can be made of it: {error}") from error
    mail.set_content(data.body)
    return mail


def reject_if_final(codes: list[int], error: Exception) -> None:
    """5xx is permanent (RFC 5321, section 4.2.1)."""
    if all(code >= 500 for code in codes):
        raise Reject(f"the mail server refused it: {error}") from error


runner = ConsumerRunner(consumers)

if __name__ == "__main__":
    runner.run()
