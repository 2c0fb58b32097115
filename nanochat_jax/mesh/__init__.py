"""Several devices and hosts: how arrays are split over them, how processes find each other, wait, stop and die."""
