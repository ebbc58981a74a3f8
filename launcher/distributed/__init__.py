"""What the ranks of a job do together: rendezvous, gathered statistics, stop requests, hang and straggler detection."""
